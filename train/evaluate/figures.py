"""What a detector learnt, in pictures; ralf.train.evaluate.page puts them on one page.

    mask         how much of each frequency the destructor takes away
    spectrum     forged over real power in each frequency (the paper's Figure 1)
    strips       crop, destroyed, rebuilt, residual, and what the decision depends on (Grad-CAM)
    roc          with the band of a bootstrap by video
    reliability  stated probabilities against true shares
    embedding    t-SNE of the last layer, by way of forging (the paper's Figure 5)

The colours are Okabe and Ito's, which people with any colour vision can distinguish; the marks
differ as well.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from ralf.kernels.dct import dct2
from ralf.train.evaluate.metrics import Scored, auc, bootstrap_weights, reliability, roc

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"


def _figure(width: float = 4.6, height: float = 3.6) -> Figure:
    # Not by pyplot, which keeps every figure in memory until it is closed.
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def mask_figure(mask: Tensor) -> Figure:
    """A mask before its sigmoid, [s, s]: dark is taken away; low frequencies at the top left."""
    figure = _figure()
    axes = figure.subplots()
    shown = axes.imshow(mask.detach().sigmoid().cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title="share of each frequency that is kept", xlabel="across", ylabel="down")
    figure.colorbar(shown)
    return figure


def spectrum_ratio(real: Tensor, forged: Tensor) -> NDArray[np.float64]:
    """Mean power of forged crops over that of real ones, per DCT coefficient: [s, s]."""

    def power(crops: Tensor) -> Tensor:
        grey = crops.double().mean(dim=1, keepdim=True) / 255
        return (dct2(grey) ** 2).mean(dim=(0, 1))

    ratio: NDArray[np.float64] = (power(forged) / power(real).clamp_min(1e-12)).numpy()
    return ratio


def spectrum_figure(real: Tensor, forged: Tensor) -> Figure:
    """The ratio in decibels, and its mean by distance from the zero frequency."""
    ratio = 10 * np.log10(np.maximum(spectrum_ratio(real, forged), 1e-12))
    figure = _figure(7.6, 3.4)
    left, right = figure.subplots(1, 2)
    # A few coefficients are far out; a scale up to them would hide all others.
    most = float(np.quantile(np.abs(ratio), 0.99)) or 1.0
    shown = left.imshow(ratio, cmap="PuOr_r", vmin=-most, vmax=most)
    figure.colorbar(shown, label="dB")
    left.set(title="forged over real", xlabel="across", ylabel="down")
    y, x = np.mgrid[: len(ratio), : len(ratio)]
    ring = np.hypot(y, x).astype(int)
    by_ring = np.bincount(ring.ravel(), ratio.ravel()) / np.bincount(ring.ravel())
    # Rings farther out than a side are cut off by the corner, and hold few coefficients.
    right.plot(by_ring[: len(ratio)], color=PALETTE[0])
    right.axhline(0, color="0.6", linewidth=0.8)
    right.set(xlabel="frequency", ylabel="dB", title="by frequency")
    return figure


def roc_figure(found: Scored, replicates: int = 200, seed: int = 0) -> Figure:
    """The ROC and the middle 95 % of its bootstraps by cluster."""
    at = np.linspace(0, 1, 201)
    curves = [
        np.interp(at, *roc(found.forged, found.logit, weight))
        for weight in bootstrap_weights(found, replicates, seed)
    ]
    fpr, tpr = roc(found.forged, found.logit)
    figure = _figure()
    axes = figure.subplots()
    if curves:
        low, high = np.quantile(curves, [0.025, 0.975], axis=0)
        axes.fill_between(at, low, high, color=PALETTE[5], alpha=0.4, label="95 %, by video")
    axes.plot(fpr, tpr, color=PALETTE[0], label=f"AUC {auc(found.forged, found.logit):.4f}")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    axes.set(xlabel="reals called forged", ylabel="forgeries caught", xlim=(0, 1), ylim=(0, 1.005))
    axes.legend(loc="lower right", frameon=False)
    return figure


def reliability_figure(forged: NDArray[np.bool_], probability: NDArray[np.float64]) -> Figure:
    """Stated probability against true share, and the number of faces in each bin."""
    said, true, number = reliability(forged, probability)
    figure = _figure()
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    filled = number > 0
    above.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    above.plot(said[filled], true[filled], "o-", color=PALETTE[0])
    above.set(ylabel="share forged", ylim=(-0.02, 1.02))
    places = (np.arange(len(number)) + 0.5) / len(number)
    below.bar(places, number, width=0.9 / len(number), color=PALETTE[5])
    below.set(xlabel="P(forged) said", ylabel="faces", xlim=(0, 1))
    return figure


def embedding_figure(features: NDArray[np.floating], names: Sequence[str], seed: int = 0) -> Figure:
    """t-SNE to two dimensions; a mark and a colour for each way of forging."""
    from sklearn.manifold import TSNE

    # t-SNE refuses a perplexity as large as the number of faces.
    perplexity = min(30.0, max(2.0, (len(features) - 1) / 3))
    flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        np.asarray(features, np.float64)
    )
    figure = _figure(5.4, 4.2)
    axes = figure.subplots()
    # Real faces first, so that they have the same colour and mark on every page.
    for number, name in enumerate(sorted(set(names), key=lambda name: (name != "real", name))):
        own = np.array([each == name for each in names])
        across, up = flat[own].T
        axes.scatter(
            across, up, s=14, label=name, alpha=0.8, linewidths=0,
            color=PALETTE[number % len(PALETTE)], marker=MARKS[number % len(MARKS)],
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def last_linear(network: nn.Module) -> nn.Linear:
    """The layer whose output is the logit."""
    found = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not found:
        raise ValueError("the network has no linear layer with one output")
    return found[-1]


@torch.no_grad()
def features_of(network: nn.Module, batches: Sequence[Tensor]) -> NDArray[np.float32]:
    """The input of the last layer, [m, c]."""
    seen: list[Tensor] = []
    hook = last_linear(network).register_forward_pre_hook(
        lambda _module, given: seen.append(given[0].detach().float().cpu())
    )
    try:
        for crops in batches:
            network(crops)
    finally:
        hook.remove()
    found: NDArray[np.float32] = torch.cat(seen).numpy()
    return found


@torch.no_grad()
def last_convolution(network: nn.Module, crops: Tensor) -> nn.Conv2d:
    """The convolution that runs last and still has a map of places.

    The last one in the list of modules may belong to a branch beside the classifier, as RALF's
    guide and FDFL's mining block.
    """
    ran: list[nn.Conv2d] = []

    def note(module: nn.Module, _given: Any, out: Tensor) -> None:
        # Squeeze-and-excitation has one place alone.
        if isinstance(module, nn.Conv2d) and min(out.shape[-2:]) > 1:
            ran.append(module)

    hooks = [
        module.register_forward_hook(note)
        for module in network.modules()
        # Not a convolution on the picture itself.
        if isinstance(module, nn.Conv2d) and module.in_channels > 3
    ]
    try:
        network(crops)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise ValueError("the network runs no convolution whose maps could show places")
    return ran[-1]


def grad_cam(network: nn.Module, crops: Tensor) -> Tensor:
    """Where evidence of forgery lies, [m, s, s] from 0 to 1, by the last maps before the pooling.

    A network names that layer itself (`cam_layer`): the last convolution that it lists may belong
    to another branch.
    """
    layer: nn.Module | None = getattr(network, "cam_layer", None)
    if layer is None:
        layer = last_convolution(network, crops[:1])
    maps: list[Tensor] = []

    def note(_module: nn.Module, _given: Any, out: Tensor) -> None:
        # Where the weights are frozen the maps would have no gradient to keep.
        out.requires_grad_(True)
        out.retain_grad()
        maps.append(out)

    hook = layer.register_forward_hook(note)
    try:
        with torch.enable_grad():
            # Faces do not mix in evaluation mode, so the sum gives each face its own gradient.
            network(crops).sum().backward()
    finally:
        hook.remove()
        network.zero_grad(set_to_none=True)
    seen = maps[-1]
    if seen.grad is None:
        raise ValueError("no gradient reaches the last convolution: the network is frozen inside")
    weight = seen.grad.mean(dim=(2, 3), keepdim=True)
    heat = (weight * seen.detach()).sum(dim=1, keepdim=True).clamp_min(0)
    heat = nn.functional.interpolate(heat, crops.shape[-2:], mode="bilinear", align_corners=False)
    most = heat.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    return (heat / most)[:, 0].detach().cpu()


def strips_figure(network: nn.Module, crops: Tensor, names: Sequence[str]) -> Figure:
    """A row for each face: the crop, what the network shows of its work, and Grad-CAM."""
    columns: list[tuple[str, NDArray[np.floating]]] = [("crop", _pictures(crops.float() / 255))]
    explain = getattr(network, "explain", None)
    if explain is not None:
        with torch.no_grad():
            shown = explain(crops)
        columns += [
            ("destroyed", _pictures(shown.destroyed)),
            ("rebuilt", _pictures(shown.rebuilt)),
            # Residuals are faint; five times as bright they can be seen.
            ("residual × 5", _pictures(shown.residual * 5)),
        ]
    columns.append(("Grad-CAM", grad_cam(network, crops).numpy()))
    figure = _figure(1.5 * len(columns), 1.55 * len(crops))
    grid = figure.subplots(len(crops), len(columns), squeeze=False)
    for row, name in enumerate(names):
        for place, (title, pictures) in enumerate(columns):
            axes = grid[row, place]
            # The crop lies under every picture; only Grad-CAM's is transparent.
            axes.imshow(columns[0][1][row])
            if pictures.ndim == 3:
                axes.imshow(pictures[row], cmap="magma", alpha=0.55, vmin=0, vmax=1)
            else:
                axes.imshow(pictures[row])
            axes.set(xticks=[], yticks=[], title=title if row == 0 else "")
        grid[row, 0].set_ylabel(name, fontsize=7)
    return figure


def _pictures(images: Tensor) -> NDArray[np.floating]:
    found: NDArray[np.floating] = images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return found
