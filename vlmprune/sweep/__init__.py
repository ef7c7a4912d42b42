"""Accuracy against cost: models x methods x budgets on a data set, resumable, with a data file and a page as result."""
