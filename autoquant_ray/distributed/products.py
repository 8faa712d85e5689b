"""Times matrix products on this process's device, by the kernels that torch has for a pair of
numeric classes: what a decode step of a quantized model does, without an engine around it.

A product is timed over as many copies of its weight as the caches cannot hold, one after the
other, as the layers of a model follow each other. The first round warms up and is not counted.

Shape letters: T tokens, O out features, I in features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import one_line
from autoquant_ray.formats.integer_pairs import INT_MM_ROWS

if TYPE_CHECKING:
    import torch

_COPIES_BYTES = 2**28
_MOST_COPIES = 64
_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product ``(T, I) x (I, O)``.

    Attributes:
        weight: Numeric class of the weight: ``16``, ``int8``, ``fp8``, ``int4``, ...
        activation: Numeric class of the input.
        tokens: T.
        out_features: O.
        in_features: I.
        group: Weights of a row that share a scale; None: no groups.
    """

    weight: str
    activation: str
    tokens: int
    out_features: int
    in_features: int
    group: int | None = None

    @property
    def pair(self) -> str:
        """``<weight>x<activation>``."""
        return f"{self.weight}x{self.activation}"

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``, of the weight."""
        return self.out_features, self.in_features


@dataclass(frozen=True, kw_only=True)
class TimedProduct:
    """What was measured of a product.

    Attributes:
        product: The product.
        kernel: torch's function.
        weight_bytes: Bytes of a weight as the kernel reads it, without scales.
        seconds: Of each round, per product.
        problem: Why there are no rounds: torch has no kernel, or it refused; None where it ran.
    """

    product: Product
    kernel: str = ""
    weight_bytes: int = 0
    seconds: tuple[float, ...] = ()
    problem: str | None = None


Kernel = tuple[str, Callable[[], Any], Callable[[Any], Any]]
"""Name, what makes a weight, and what multiplies with it."""


def time_products(
    products: Sequence[Product], *, device: str, num_threads: int, num_rounds: int
) -> tuple[str, list[TimedProduct]]:
    """Time products, one after the other.

    Args:
        products: What to time.
        device: ``cpu`` or ``cuda``, whose current device is taken.
        num_threads: Threads of CPU kernels.
        num_rounds: Rounds that count.

    Returns:
        The device in words, with torch's version, and what was measured of each product.
    """
    import torch

    torch.set_num_threads(num_threads)
    timed = [_timed(product, device, num_rounds) for product in products]
    return f"{_device_name(device, num_threads)}, torch {torch.__version__}", timed


def _timed(product: Product, device: str, num_rounds: int) -> TimedProduct:
    try:
        kernel = _kernel(product, device)
        if kernel is None:
            return TimedProduct(product=product, problem=f"torch has no kernel for {product.pair}")
        name, make, multiply = kernel
        weight = make()
        num_bytes = _num_bytes(weight)
        copies = max(1, min(_MOST_COPIES, _COPIES_BYTES // max(1, num_bytes)))
        weights = [weight, *(make() for _ in range(copies - 1))]
        rounds = [_round(weights, multiply, device) for _ in range(num_rounds + 1)]
    except RuntimeError as error:  # out of memory and not implemented among them
        return TimedProduct(
            product=product, problem=f"torch refused {product.pair}: {one_line(error, limit=120)}"
        )
    seconds = tuple(total / copies for total in rounds[1:])
    return TimedProduct(product=product, kernel=name, weight_bytes=num_bytes, seconds=seconds)


def _round(weights: Sequence[Any], multiply: Callable[[Any], Any], device: str) -> float:
    """Seconds of a product with each weight, once."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        for weight in weights:
            multiply(weight)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for weight in weights:
        multiply(weight)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _num_bytes(weight: Any) -> int:
    """Bytes of a weight without its scales, which come behind it."""
    tensor = weight[0] if isinstance(weight, tuple) else weight
    return int(tensor.nbytes)


def _kernel(product: Product, device: str) -> Kernel | None:
    """The kernel of a product; None where torch has none."""
    import torch

    shape = product.shape
    states_TI = torch.randn(product.tokens, shape[1], device=device).bfloat16()
    if product.pair == "16x16":
        make = partial(torch.randn, *shape, dtype=torch.bfloat16, device=device)
        return "torch.mm", make, lambda weight_OI: torch.mm(states_TI, weight_OI.T)
    if product.pair == "int8xint8":
        return _int8(states_TI, shape, device)
    if product.pair == "fp8xfp8":
        return _fp8(states_TI, shape, device)
    if product.pair == "int4x16" and product.group in _GROUPS:
        return _packed_int4(states_TI, shape, device, product.group)
    if product.pair == "int8x16" and device == "cpu":
        scale_O = torch.full((shape[0],), 0.01, dtype=torch.bfloat16)
        return (
            "torch._weight_int8pack_mm",
            partial(_whole_numbers, shape, device),
            lambda weight_OI: torch._weight_int8pack_mm(states_TI, weight_OI, scale_O),
        )
    return None


def _whole_numbers(shape: Sequence[int], device: str) -> torch.Tensor:
    import torch

    return torch.randint(-127, 128, tuple(shape), dtype=torch.int8, device=device)


def _int8(states_TI: torch.Tensor, shape: Sequence[int], device: str) -> Kernel:
    import torch

    rows = max(len(states_TI), INT_MM_ROWS) if device == "cuda" else len(states_TI)
    whole_TI = _whole_numbers((rows, shape[1]), device)
    return (
        "torch._int_mm",
        partial(_whole_numbers, shape, device),
        lambda weight_OI: torch._int_mm(whole_TI, weight_OI.T),
    )


def _fp8(states_TI: torch.Tensor, shape: Sequence[int], device: str) -> Kernel:
    import torch

    unit = torch.ones((), device=device)
    small_TI = states_TI.to(torch.float8_e4m3fn)

    def make() -> torch.Tensor:
        return torch.randn(*shape, device=device).to(torch.float8_e4m3fn)

    def multiply(weight_OI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch._scaled_mm(
            small_TI, weight_OI.T, scale_a=unit, scale_b=unit, out_dtype=torch.bfloat16
        )
        return product

    return "torch._scaled_mm", make, multiply


def _packed_int4(states_TI: torch.Tensor, shape: Sequence[int], device: str, group: int) -> Kernel:
    import torch

    scales = torch.full((shape[1] // group, shape[0], 2), 0.01, dtype=torch.bfloat16, device=device)

    def make() -> tuple[torch.Tensor]:
        numbers_OI = torch.randint(0, 16, tuple(shape), dtype=torch.int32, device=device)
        if device == "cpu":
            return (torch._convert_weight_to_int4pack_for_cpu(numbers_OI, 8),)
        pairs_OI = (numbers_OI[:, ::2] << 4 | numbers_OI[:, 1::2]).to(torch.uint8)
        return (torch._convert_weight_to_int4pack(pairs_OI, 8),)

    def multiply(weight: tuple[torch.Tensor]) -> torch.Tensor:
        run = torch._weight_int4pack_mm_for_cpu if device == "cpu" else torch._weight_int4pack_mm
        product: torch.Tensor = run(states_TI, weight[0], group, scales)
        return product

    return "torch._weight_int4pack_mm", make, multiply


def _device_name(device: str, num_threads: int) -> str:
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {num_threads} thread(s)"


def _processor() -> str:
    """The processor in words; 'CPU' where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else "CPU"


def spread_of(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle
