"""Products with curvature matrices: ours, and what one writes with torch alone.

Every matrix is that of the mean cross entropy of the batch, or, where there is a vector per micro-batch, of each
micro-batch; products are left in ``Step.product``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark.functorch import functional_loss
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.curvature import Hessian, batched_hvp, fisher_vp, ggn_vp
from fastreg.tracing import compile

# Vectors multiplied at once, where it is several with one matrix.
SEVERAL = 8
Chunk = tuple[Tensor, Tensor]


def vectors(problem: Problem, count: int) -> dict[str, Tensor]:
    """``count`` vectors on the parameters, name -> ``[count, *shape]``; the same ones in every dtype."""
    generator = torch.Generator().manual_seed(1)
    parameters = problem.model.named_parameters()
    return {name: torch.randn(count, *p.shape, generator=generator).to(p) for name, p in parameters}


def vector(problem: Problem) -> dict[str, Tensor]:
    """The first of :func:`vectors`, without the leading dimension."""
    return {name: v[0] for name, v in vectors(problem, 1).items()}


def hvp(problem: Problem) -> Step:
    """``batched_hvp`` of one vector."""
    return _fastreg(problem, batched_hvp, vector(problem))


def hvp_compiled(problem: Problem) -> Step:
    """``batched_hvp`` of one vector through ``fastreg.compile``."""
    model, v = problem.model, vector(problem)

    def product(inputs: Tensor, targets: Tensor, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return batched_hvp(model, mean_cross_entropy, (inputs, targets), v)

    compiled = compile(product, model)

    def compute() -> list[Tensor]:
        with problem.precision():
            return list(compiled(problem.inputs, problem.targets, v).values())

    return product_step(problem, compute)


def hvp_several(problem: Problem) -> Step:
    """``batched_hvp`` of several vectors."""
    return _fastreg(problem, batched_hvp, vectors(problem, SEVERAL))


def hvp_micro(problem: Problem) -> Step:
    """``batched_hvp`` of a vector per micro-batch, averaged."""
    return _fastreg(problem, _per_micro_batch(problem), vectors(problem, problem.micro_batches))


def hvp_micro_grad(problem: Problem) -> Step:
    """``batched_hvp`` of every micro-batch's own gradient, averaged."""
    return _fastreg(problem, _per_micro_batch(problem), "grad")


def ggn(problem: Problem) -> Step:
    """``ggn_vp`` of one vector."""
    return _fastreg(problem, ggn_vp, vector(problem))


def fisher_exact(problem: Problem) -> Step:
    """``fisher_vp`` of one vector, expectation over labels in closed form."""
    return _fastreg(problem, partial(fisher_vp, kind="exact"), vector(problem))


def _per_micro_batch(problem: Problem) -> Callable[..., Mapping[str, Tensor]]:
    return partial(batched_hvp, micro_batch_size=problem.micro_batch_size, reduce="mean")


def _fastreg(
    problem: Problem, product: Callable[..., Mapping[str, Tensor]], multiplied: Mapping[str, Tensor] | str
) -> Step:
    def compute() -> list[Tensor]:
        with problem.precision():
            found = product(problem.model, mean_cross_entropy, (problem.inputs, problem.targets), multiplied)
        return list(found.values())

    return product_step(problem, compute)


def hvp_kept(problem: Problem) -> Step:
    """A product of the ``Hessian`` operator after its first, which has recorded the batch."""
    batch = problem.inputs, problem.targets
    flat = torch.cat([v.flatten() for v in vector(problem).values()])
    kept: list[Hessian] = []

    def compute() -> list[Tensor]:
        if not kept:
            kept.append(Hessian(problem.model, mean_cross_entropy, batch))
        with problem.precision():
            return [kept[0] @ flat]

    compute()
    return product_step(problem, compute, kept.clear)


def double_backward(problem: Problem) -> Step:
    """The gradient of ``<g, v>``."""
    v = list(vector(problem).values())
    return product_step(problem, lambda: hessian_product(problem, (problem.inputs, problem.targets), v))


def double_backward_kept(problem: Problem) -> Step:
    """The same with the graph of g kept from one product to the next."""
    v, parameters = list(vector(problem).values()), list(problem.model.parameters())
    kept: list[Tensor] = []

    def compute() -> Sequence[Tensor]:
        if not kept:
            kept.extend(symbolic_gradient(problem, (problem.inputs, problem.targets)))
        return torch.autograd.grad(kept, parameters, v, retain_graph=True)

    compute()
    return product_step(problem, compute, kept.clear)


def sequential_micro(problem: Problem) -> Step:
    """One double backward per micro-batch, each with its vector, averaged."""
    v = list(vectors(problem, problem.micro_batches).values())
    return product_step(problem, lambda: micro_batch_products(problem, v))


def symbolic_gradient(problem: Problem, chunk: Chunk) -> tuple[Tensor, ...]:
    """The gradient of the chunk's mean loss, with a graph; attention runs on the MATH backend, which has one."""
    with sdpa_kernel(SDPBackend.MATH):
        with problem.precision():
            loss = mean_cross_entropy(problem.model(chunk[0]), chunk[1])
        return torch.autograd.grad(loss, list(problem.model.parameters()), create_graph=True)


def hessian_product(problem: Problem, chunk: Chunk, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``H v`` of the chunk's mean loss, one tensor per parameter."""
    return torch.autograd.grad(symbolic_gradient(problem, chunk), list(problem.model.parameters()), v)


def micro_batch_products(problem: Problem, v: Sequence[Tensor]) -> list[Tensor]:
    """``mean_k H_k v_k`` for ``v`` with ``[m, *shape]`` per parameter, one micro-batch after another."""
    total = [torch.zeros_like(p) for p in problem.model.parameters()]
    for k, chunk in enumerate(problem.chunks()):
        found = hessian_product(problem, chunk, [part[k] for part in v])
        torch._foreach_add_(total, found, alpha=1 / problem.micro_batches)
    return total


def func_hvp(problem: Problem) -> Step:
    """``torch.func``: forward over reverse."""
    return _functorch(problem, _func_product(problem), vector(problem))


def func_hvp_several(problem: Problem) -> Step:
    """The same, vmapped over several vectors."""
    many = vmap(_func_product(problem), in_dims=(None, None, None, 0))
    return _functorch(problem, many, vectors(problem, SEVERAL))


def func_micro(problem: Problem) -> Step:
    """The same, vmapped over micro-batches, each with its vector, and averaged."""
    products = vmap(_func_product(problem), in_dims=(None, 0, 0, 0))

    def averaged(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chunks = (t.unflatten(0, (problem.micro_batches, -1)) for t in (x, y))
        return {name: found.mean(0) for name, found in products(parameters, *chunks, v).items()}

    return _functorch(problem, averaged, vectors(problem, problem.micro_batches))


def _func_product(problem: Problem) -> Callable[..., dict[str, Tensor]]:
    """``H v`` as a function of (parameters, inputs, targets, vector)."""
    gradient = grad(functional_loss(problem))

    def product(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return jvp(lambda at: gradient(at, x, y), (parameters,), (v,))[1]

    return product


def _functorch(problem: Problem, product: Callable[..., Mapping[str, Tensor]], v: Mapping[str, Tensor]) -> Step:
    def compute() -> list[Tensor]:
        parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):
            return list(product(parameters, problem.inputs, problem.targets, dict(v)).values())

    return product_step(problem, compute)


def product_step(
    problem: Problem, compute: Callable[[], Sequence[Tensor]], forget: Callable[[], None] | None = None
) -> Step:
    """A step whose run keeps what ``compute()`` gives as its product."""
    found: list[Tensor] = []

    def run() -> None:
        found[:] = compute()

    def clear() -> None:
        found.clear()
        if forget is not None:
            forget()

    return Step(problem.model, run, product=lambda: torch.cat([part.flatten() for part in found]), forget=clear)
