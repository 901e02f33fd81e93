"""scikit-learn's handwritten digits: a small network that reads them upright learns to read them turned by 90 degrees.

    suffix  meaning
    K       members of a pack
    N       samples
    C       classes, 10

Real data that ships with a dependency, and small enough that a sweep takes seconds. A 64-128-128-10 network is
trained on upright digits and frozen; LoRA adapts it to turned ones. The metric is the cross-entropy of held-out
turned digits in nats, with accuracy beside it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

_WIDTH = 128
_HELD_OUT = 0.25
_SPLIT_SEED = 0
_BASE_STEPS = 600
_BASE_BATCH = 64
_BASE_LR = 3e-3


class DigitsNet(nn.Module):
    """64-128-128-10, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, _WIDTH)
        self.fc2 = nn.Linear(_WIDTH, _WIDTH)
        self.head = nn.Linear(_WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 10] of images [..., 64]."""
        hidden = torch.relu(self.fc1(x))
        return self.head(torch.relu(self.fc2(hidden)))  # type: ignore[no-any-return]


class DigitsTask:
    """Turned digits over a network that was trained on upright ones."""

    def __init__(self, model: nn.Module, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> None:
        """Takes a frozen model and (images [N, 64], labels [N]) for training and for evaluation."""
        self.model = model
        self._train = train
        self._held_out = held_out

    @classmethod
    def load(cls, base_seed: int, *, cache: Path, device: torch.device, dtype: torch.dtype) -> DigitsTask:
        """Loads the data, and the base network from the cache or by training it.

        Args:
            base_seed: decides the base network.
            cache: where base networks are kept.
            device: for the model and the data.
            dtype: for the model and the images.
        """
        upright, turned, labels = _images()
        order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(len(labels)))
        n_held_out = round(_HELD_OUT * len(labels))
        held_out, train = order[:n_held_out], order[n_held_out:]
        model = _base_network(base_seed, upright[train], labels[train], cache).to(device, dtype)
        images, labels = turned.to(device, dtype), labels.to(device)
        return cls(model, (images[train], labels[train]), (images[held_out], labels[held_out]))

    @property
    def n_samples(self) -> int:
        """Size of the training set."""
        return len(self._train[1])

    @property
    def data(self) -> dict[str, Tensor]:
        """Images and labels of both sets."""
        names = ("images", "labels", "held-out images", "held-out labels")
        return dict(zip(names, (*self._train, *self._held_out), strict=True))

    def most_rows(self, batch_size: int) -> int:
        """The batch, or the whole held-out set."""
        return max(batch_size, len(self._held_out[1]))

    def losses_K(self, indices: Tensor, members: int) -> Tensor:
        """Mean cross-entropy of each member [K], in nats."""
        images, labels = self._train
        indices = indices.to(labels.device)
        return self._cross_entropy_KN(images[indices], labels[indices], members)[0].mean(dim=1)

    @torch.no_grad()
    def evaluate(self, members: int) -> list[dict[str, float]]:
        """Held-out cross-entropy in nats, and accuracy, of each member."""
        loss_KN, correct_KN = self._cross_entropy_KN(*self._held_out, members)
        loss_K, accuracy_K = loss_KN.double().mean(dim=1), correct_KN.double().mean(dim=1)
        pairs = zip(loss_K.tolist(), accuracy_K.tolist(), strict=True)
        return [{"eval/loss": loss, "eval/accuracy": accuracy} for loss, accuracy in pairs]

    def _cross_entropy_KN(self, images_ND: Tensor, labels_N: Tensor, members: int) -> tuple[Tensor, Tensor]:
        logits_MC = self.model(images_ND.repeat(members, 1))
        labels_M = labels_N.repeat(members)
        loss_M = nn.functional.cross_entropy(logits_MC, labels_M, reduction="none")
        shape = (members, len(labels_N))
        return loss_M.view(shape), (logits_MC.argmax(dim=1) == labels_M).view(shape)


def _images() -> tuple[Tensor, Tensor, Tensor]:
    """Upright images [N, 64] in 0..1, the same turned by 90 degrees, and labels [N]."""
    digits = load_digits()
    upright_NHW = digits.images / 16.0
    turned_NHW = np.rot90(upright_NHW, axes=(1, 2))
    upright, turned = (
        torch.tensor(images.reshape(-1, 64).copy(), dtype=torch.float32) for images in (upright_NHW, turned_NHW)
    )
    return upright, turned, torch.tensor(digits.target, dtype=torch.int64)


def _base_network(seed: int, images: Tensor, labels: Tensor, cache: Path) -> DigitsNet:
    path = cache / f"digits-base-{seed}.safetensors"
    network = _initial_network(seed)
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        _train_base(network, images, labels, seed)
        _save_atomically(network.state_dict(), path)
    return network.requires_grad_(False).eval()


def _initial_network(seed: int) -> DigitsNet:
    # nn.Linear draws from the global generator; a fork of it leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNet()


def _train_base(network: DigitsNet, images: Tensor, labels: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums are taken in the same order whatever machine or worker trains it
    try:
        _train_base_steps(network, images, labels, generator)
    finally:
        torch.set_num_threads(threads)


def _train_base_steps(network: DigitsNet, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=_BASE_LR)
    for _ in range(_BASE_STEPS):
        batch = torch.randint(len(labels), (_BASE_BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    """Several workers may make the same file at once; each writes its own and the last one to rename wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
    save_file(tensors, temporary)
    os.replace(temporary, path)
