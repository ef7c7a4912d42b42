import os

import torch

# The models here are tiny: threads cost more than they bring.
torch.set_num_threads(1)
# Tables are looked at as on a wide terminal, wherever the tests run.
os.environ["COLUMNS"] = "200"
