"""Offsets past 2^31 elements: the text of every kernel takes them in 64 bits; and on a GPU one call that needs it.

test_interp_hostile_offsets.py runs kernels with such strides under the interpreter.
"""

from __future__ import annotations

import ast
import functools

import pytest
import torch
from hostile import EVERY, NAMED

import flagen
from flagen import compiler
from flagen.compare import measure
from flagen.testing import make_inputs

# what a program may multiply in 32 bits: channels, rows of a chunk, blocks of them; sizes of a state are below 2^18
SMALL = {"o_k", "o_k2", "o_kc", "o_v", "o_f", "o_i", "i_v", "i_k", "i_f"}
SIZES = {"N", "T", "H", "L", "NP", "NC", "scale"}  # arguments that are no pointers, beside strides


class Offsets(ast.NodeVisitor):
    """Finds the products in a kernel's offsets that are taken in 32 bits and may pass 2^31.

    Triton keeps an integer argument in 32 bits where its value fits, so that the product of a stride and an index
    overflows although neither does. Right is a factor that was made int64, by .to(tl.int64) or from such.
    """

    def __init__(self, kernel: ast.FunctionDef) -> None:
        arguments = kernel.args.args
        self.constants = {one.arg for one in arguments if one.annotation is not None}
        runtime = [one.arg for one in arguments if one.annotation is None]
        self.pointers = {one for one in runtime if one not in SIZES and not self._is_stride(one)}
        self.wide: set[str] = set()
        self.zero: set[str] = set()
        self.found: list[str] = []
        for _ in range(4):  # what loops carry is seen at the second pass
            self.found.clear()
            self.visit(kernel)

    @staticmethod
    def _is_stride(name: str) -> bool:
        return "_s" in name and name.rsplit("_s", 1)[1] in ("b", "t", "h", "p")

    def visit_Assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        names = [x.id for x in ast.walk(target) if isinstance(x, ast.Name)]
        if len(names) == 1:
            self._know(names[0], node.value)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name) and node.target.id in self.pointers:
            self._check(node.value)
        self.visit(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Add) and self._is_pointer(node.left):
            self._check(node.right)
        self.generic_visit(node)

    def _know(self, name: str, value: ast.expr) -> None:
        if self._is_pointer(value):
            self.pointers.add(name)
        if self._is_wide(value):
            self.wide.add(name)
        if ast.unparse(value) == "tl.arange(0, 1)" or (isinstance(value, ast.Name) and value.id in self.zero):
            self.zero.add(name)

    def _is_pointer(self, node: ast.expr) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._is_pointer(node.left)
        return isinstance(node, ast.Name) and node.id in self.pointers

    def _is_wide(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(".to"):
                return ast.unparse(node.args[0]) == "tl.int64"
            return name in ("tl.maximum", "tl.minimum") and any(self._is_wide(x) for x in node.args)
        if isinstance(node, ast.BinOp):
            return self._is_wide(node.left) or self._is_wide(node.right)
        if isinstance(node, ast.IfExp):
            return self._is_wide(node.body) and self._is_wide(node.orelse)
        if isinstance(node, ast.Subscript):
            return self._is_wide(node.value)
        return isinstance(node, ast.Name) and node.id in self.wide

    def _is_small(self, node: ast.expr) -> bool:
        names = [x.id for x in ast.walk(node) if isinstance(x, ast.Name)]
        return all(x in SMALL or x in self.constants or x.isupper() for x in names)

    def _check(self, node: ast.expr) -> None:
        """The products of an offset, but those inside a load or a comparison, which are of its value."""
        if isinstance(node, ast.Call | ast.Compare):
            return
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = node.left, node.right
            nothing = any(x in self.zero for side in sides for x in map(ast.unparse, ast.walk(side)))
            if not any(map(self._is_wide, sides)) and not all(map(self._is_small, sides)) and not nothing:
                self.found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child)


@functools.cache
def source_of(spec) -> str:
    return compiler.prepare(spec)[1].source


def offsets_of(source: str) -> dict[str, list[str]]:
    """The products at fault, by kernel; and the number of kernels."""
    kernels = [
        one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef) and one.name.endswith("_kernel")
    ]
    assert len(kernels) >= 5
    return {one.name: found for one in kernels if (found := Offsets(one).found)}


@EVERY
def test_offsets_are_taken_in_64_bits(spec):
    assert offsets_of(source_of(spec)) == {}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("i_t = i_t.to(tl.int64)", "i_t = i_t + 0"),
        ("i_n = i_n.to(tl.int64)", "i_n = i_n + 0"),
        ("i_ph = i_p.to(tl.int64) * H + i_h", "i_ph = i_p * H"),
        ("i_nh = (tl.program_id(0) // NV).to(tl.int64)", "i_nh = tl.program_id(0) // NV"),
        ("i_n = (tl.program_id(2) // H).to(tl.int64)", "i_n = tl.program_id(2) // H"),
        ("i_h = (tl.program_id(2) % H).to(tl.int64)", "i_h = tl.program_id(2) % H"),
    ],
)
def test_an_offset_in_32_bits_is_seen(right, wrong):
    """In gla, each of the places where 64 bits begin."""
    source = source_of(NAMED["gla"])
    assert right in source
    # heads and sequences come together, and one that is wide makes the sum of both wide
    for narrow in ("i_h", "i_n") if "program_id(2)" in right else ():
        source = source.replace(f"{narrow} = (tl.program_id(2)", f"{narrow} = 0 + (tl.program_id(2)")
        source = source.replace("// H).to(tl.int64)", "// H)").replace("% H).to(tl.int64)", "% H)")
    assert offsets_of(source.replace(right, wrong))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gla", "mamba2", "linear"])
def test_more_than_2_to_the_31_elements(name):
    """16 heads that are one: each must be what that head alone is, forward and backward."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip("needs 60 GB of a device's memory")
    tokens, heads, width = (1 << 20) + 4096, 16, 128
    assert tokens * heads * width > 1 << 31
    spec = NAMED[name]
    op = flagen.compile(spec, backend="triton")
    made = make_inputs(spec, B=1, T=tokens, H=1, K=width, V=width, dtype=torch.bfloat16, device="cuda")
    do = torch.randn(1, tokens, 1, width, device="cuda", dtype=torch.bfloat16)

    def run(count):
        leaves = []
        for one, x in zip(spec.inputs, made.values(), strict=True):
            at = one.axes.index("h")
            # expanded: the inputs need no memory, but gradients do
            leaves.append(x.expand(*x.shape[:at], count, *x.shape[at + 1 :]).detach().requires_grad_())
        o, _ = op(*leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, do.expand(-1, -1, count, -1)))

    want, got = run(1), run(heads)
    # a sum over a million tokens may cancel: this is the size of its terms
    steps = [x * y for one, x, y in zip(spec.inputs, made.values(), want[1:], strict=True) if one.axes == "bth"]
    size = max([float(x.double().norm()) for x in steps], default=0.0)
    for name_, one, x, y in zip(("o", *made), (None, *spec.inputs), got, want, strict=True):
        axes = "bthv" if one is None else one.axes
        for head in range(heads):
            part = x.narrow(axes.index("h"), head, 1)
            if "t" not in axes:
                assert measure(part, y, floor=size).within(2e-2), (name_, head)
                continue
            for begin in (0, tokens // 2, tokens - 4096):  # measure works in fp64: a part of the tokens at a time
                mine, other = (z.narrow(1, begin, 4096) for z in (part, y))
                assert measure(mine, other, channels=axes[-1] in "kv").within(2e-2), (name_, head, begin)
