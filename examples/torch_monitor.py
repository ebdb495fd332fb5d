"""Handwritten digits in PyTorch, with a log of how each batch normalization does while the network learns."""

import csv
from pathlib import Path

import torch
from torch import nn

from batchnorm import BatchNorm1d, monitor
from batchnorm.studies.data import load_digits

torch.manual_seed(0)
digits = load_digits()
x, y, x_test, y_test = map(torch.tensor, (digits.x_train, digits.y_train, digits.x_test, digits.y_test))
net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
with monitor(
    net, "norms.csv", every=25
):  # or a function, a SummaryWriter, a run of W&B, a logger of Lightning
    for _ in range(3):  # epochs
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
for row in csv.DictReader(Path("norms.csv").read_text().splitlines()):
    if row["name"] == "bn/2/mean_distance":  # in standard deviations of the batch
        print(f"step {row['step']}: the running mean is {float(row['value']):.2f} off")
accuracy = (net.eval()(x_test).argmax(1) == y_test).float().mean().item()
print(f"held-out accuracy: {accuracy:.1%}")
