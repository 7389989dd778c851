"""bfloat16 on a processor that cannot multiply it."""

import pytest
import torch
import vits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib.models.backbone import write_out_attention
from lib.runs import environment
from lib.spec import RunSpec
from lib.training import bfloat16
from lib.training.bfloat16 import PRODUCTS, RoundedProducts, products

HALF = RunSpec(dtype="bfloat16")


class Seen(TorchDispatchMode):
    """The operations that reach the kernels with a bfloat16 tensor among their operands."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(each, torch.Tensor) and each.dtype is torch.bfloat16 for each in args):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def step(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    out.float().square().mean().backward()
    return out


def test_an_operand_is_rounded_before_and_the_sum_after():
    left = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    with RoundedProducts():
        exact = left @ torch.tensor([[1.0], [1.0]], dtype=torch.bfloat16)
        whole = left.float() @ torch.ones(2, 1)
    assert exact.dtype is torch.bfloat16 and exact.item() == 1.0  # 1 + 2^-9 has more than 8 digits
    # No product of float32 is touched.
    assert whole.dtype is torch.float32 and whole.item() == 1.0 + 2.0**-9


@pytest.mark.parametrize(
    ("product", "shapes"), [(torch.mm, [(5, 3), (3, 4)]), (torch.addmm, [(4,), (5, 3), (3, 4)])]
)
def test_a_product_that_is_written_into_a_tensor_is_that_of_its_plain_form(product, shapes):
    torch.manual_seed(0)
    operands = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    rows = torch.full((7, 4), -1.0, dtype=torch.bfloat16)
    with Seen() as seen, RoundedProducts():
        plain = product(*operands)
        product(*operands, out=rows[:5])
    assert torch.equal(rows[:5], plain) and (rows[5:] == -1.0).all()
    assert not any("mm" in name for name in seen.names)
    exact = product(*(operand.double() for operand in operands))
    torch.testing.assert_close(plain.double(), exact, rtol=2**-8, atol=1e-5)


def test_values_and_gradients_are_the_processors_own_up_to_the_order_of_sums():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
    )
    images = torch.randn(5, 3, 8, 8)
    own = step(model, images)
    theirs = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with RoundedProducts():
        ours = step(model, images)
    assert ours.dtype is own.dtype is torch.bfloat16
    torch.testing.assert_close(ours, own, rtol=2**-7, atol=2**-8)
    for mine, yours in zip((p.grad for p in model.parameters()), theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=2**-5, atol=2**-7 * float(yours.abs().max()))


def test_no_product_of_a_step_or_an_evaluation_reaches_a_bfloat16_kernel():
    model, (images, _) = vits.build(moe=vits.moe()), vits.batch(3)
    write_out_attention(model)
    with Seen() as seen, RoundedProducts():
        step(model, images)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(images)
    names = {op.overloadpacket.__name__ for op in PRODUCTS}
    assert not seen.names & names and "gelu" in seen.names
    assert not {
        name for name in seen.names if any(part in name for part in ("attention", "mm", "conv"))
    }


def test_only_runs_in_bfloat16_on_such_a_processor_need_it(monkeypatch):
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda: False)
    assert isinstance(products(HALF), RoundedProducts)
    assert not isinstance(products(HALF.but(dtype="float32")), RoundedProducts)
    assert environment.environment(HALF)["products"] == "float32, rounded to bfloat16"
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda: True)
    assert not isinstance(products(HALF), RoundedProducts)
    assert environment.environment(HALF)["products"] == "bfloat16"
