"""Federated digits in PyTorch: clients of uneven size and kind, whose running statistics merge exactly."""

from copy import deepcopy

import torch
from torch import nn

from batchnorm import BatchNorm1d, calibrate, merge_statistics
from batchnorm.studies.data import load_digits

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.x_train).flatten(1), torch.tensor(digits.y_train)
parts = torch.argsort(y + 6 * torch.rand(len(y))).split([1200, 700, 400, 150, 50])  # roughly by digit
model = nn.Sequential(nn.Linear(784, 64), BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
for _ in range(6):  # rounds
    clients = [(deepcopy(model), part) for part in parts]
    for net, part in clients:  # each trains on data that no other client has
        optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
        for batch in part[torch.randperm(len(part))].split(50):
            net.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    for name, p in model.named_parameters():  # the server averages weights, which go back to the clients
        p.data = sum(net.get_parameter(name).data * len(part) / len(x) for net, part in clients)
    clients = [(deepcopy(model), part) for part in parts]
    counts = [calibrate(net, [x[part]]) for net, part in clients]  # statistics of their own data
    model.load_state_dict(merge_statistics([net.state_dict() for net, _ in clients], counts), strict=False)
found = model.eval()(torch.tensor(digits.x_test).flatten(1)).argmax(1).numpy()
print(f"held-out accuracy: {(found == digits.y_test).mean():.1%}")
