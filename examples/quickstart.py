"""A learned optimizer in an ordinary training loop: digits, a small network, no learning rate to choose."""

import torch
import torch.nn.functional as F
from torch import nn

from learnedopt import LearnedOptimizer
from learnedopt.data import digits

torch.manual_seed(0)
data = digits()
images, labels = data.split("train")

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = LearnedOptimizer(model.parameters())

for step in range(1, 301):
    index = torch.randint(len(labels), (64,))
    loss = F.cross_entropy(model(images[index]), labels[index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

test_images, test_labels = data.split("test")
with torch.no_grad():
    accuracy = (model(test_images).argmax(-1) == test_labels).float().mean().item()
print(f"test accuracy: {100 * accuracy:.1f} %")
