"""Our Inception-v3 and LPIPS beside the reference packages, on shared random weights. Not part of the tests.

Needs torch-fidelity, torchvision and lpips, which the library itself does not: in an environment of its own,
`pip install --no-deps torch-fidelity torchvision lpips tqdm scipy` beside the library's. Prints one line a comparison:
the largest absolute difference, and the largest value compared.
"""

import tempfile
from pathlib import Path

import torch

# torchvision's wheel is built for CUDA; beside a CPU build of torch its operators are missing. Its models need none.
if not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lpips
import torch_fidelity
import torchmetrics
import torchvision
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.fid import NoTrainInceptionV3

from diffusion_tokred.evaluation.inception import Inception
from diffusion_tokred.evaluation.lpips import Lpips

SIZES = ((64, 64), (128, 128), (256, 256), (299, 299), (200, 333), (512, 384))


def show(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    print(f"{what:70s} {(ours - theirs).abs().max().item():.2e} of {theirs.abs().max().item():.3g}")


def pictures(size: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_inception() -> dict[str, torch.Tensor]:
    """Weights that keep activations of one size through the network; batch norm with statistics of its own."""
    model = Inception(None)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    return model.state_dict()


def check_inception(folder: Path) -> None:
    file = folder / "inception.pth"
    torch.save(random_inception(), file)
    for resize in ("tf1", "antialias"):
        ours = Inception(file, resize=resize)
        options = {"feature_extractor_weights_path": str(file), "antialias": resize == "antialias"}
        theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], **options)
        classes = NoTrainInceptionV3("inception-v3-compat", ["logits"], **options)
        for size in SIZES:
            x = pictures(size, sum(size))
            features = ours(x)
            show(f"Inception, {resize}, {size[0]}x{size[1]}: features", features, theirs(x))
        show(f"Inception, {resize}: logits", ours.logits(features), classes(x))


def check_lpips(folder: Path, net: str, name: str) -> None:
    file = folder / f"{name}.pth"
    source = getattr(torchvision.models, name)(weights=None).eval()
    torch.save(source.state_dict(), file)
    ours = Lpips(net, file)
    packages = {
        "lpips": lpips.LPIPS(net=net, pnet_rand=True, verbose=False),
        "torchmetrics": _NoTrainLpips(net=net, pnet_rand=True),
    }
    for theirs in packages.values():
        for mine, given in zip(theirs.net.parameters(), source.features.parameters(), strict=True):
            mine.data.copy_(given)
    for head, i in zip(ours.heads, range(5), strict=True):
        show(f"LPIPS {net}: head {i}", head, getattr(packages["lpips"], f"lin{i}").model[1].weight[0])
    for size in SIZES:
        a, b = pictures(size, 0), pictures(size, 1)
        b[1] = a[1].int().add(pictures(size, 2)[1] // 16).clamp(max=255).byte()  # a pair that is close
        x = a.float() / 127.5 - 1
        shift, scale = packages["lpips"].scaling_layer.shift, packages["lpips"].scaling_layer.scale
        last = len(ours.features)
        show(f"{name}, {size[0]}x{size[1]}: features", ours.stages(a)[-1], source.features[:last]((x - shift) / scale))
        for package, theirs in packages.items():
            there = theirs(x, b.float() / 127.5 - 1).flatten()
            show(f"LPIPS {net}, {size[0]}x{size[1]}: {package}", ours(a, b), there)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    versions = {m.__name__: m.__version__ for m in (torch, torchmetrics, torch_fidelity, torchvision)}
    print(versions | {"lpips": getattr(lpips, "__version__", "0.1.4")})
    with tempfile.TemporaryDirectory() as place:
        check_inception(Path(place))
        check_lpips(Path(place), "alex", "alexnet")
        check_lpips(Path(place), "vgg", "vgg16")
