"""The ops fastreg computes with: one folder each, a plain torch reference beside every fast form.

Public functions check their arguments and call a private torch operator; they are not
differentiable. Letters: S rows, m segments, I inputs, O outputs, C channels, P places, R rows of a
normalisation, N features of a row; R rows and C classes of a cross entropy.
"""

from __future__ import annotations

if __name__ == "fastreg.kernels":
    from fastreg.kernels._registry import (
        BACKENDS,
        Candidate,
        Implementation,
        Op,
        backend,
        explain,
        has_fast_form,
        registry,
    )
    from fastreg.kernels.affine_sqnorm import affine_sqnorm
    from fastreg.kernels.attention import attention_backward, attention_double_backward, attention_forward
    from fastreg.kernels.attention.pattern import Pattern
    from fastreg.kernels.convolution import conv_apply, conv_outer
    from fastreg.kernels.cross_entropy import (
        cross_entropy,
        cross_entropy_backward,
        cross_entropy_double_backward,
        cross_entropy_gradient,
        cross_entropy_gradient_,
    )
    from fastreg.kernels.gelu_double_backward import gelu_double_backward
    from fastreg.kernels.index_sqnorm import index_sqnorm
    from fastreg.kernels.multi_tensor import adamw_step_, multi_axpy_, multi_dot, multi_sqnorm, sgd_step_
    from fastreg.kernels.norm_affine import norm_affine, norm_affine_backward, norm_affine_double_backward
    from fastreg.kernels.normalize import normalize, normalize_backward, normalize_double_backward
    from fastreg.kernels.outer_apply import outer_apply
    from fastreg.kernels.outer_sqnorm import outer_sqnorm
    from fastreg.kernels.outer_sum import outer_sum
    from fastreg.kernels.segment_dot import segment_dot
    from fastreg.kernels.segment_sum import segment_sum

    __all__ = [
        "BACKENDS",
        "Candidate",
        "Implementation",
        "Op",
        "Pattern",
        "adamw_step_",
        "affine_sqnorm",
        "attention_backward",
        "attention_double_backward",
        "attention_forward",
        "backend",
        "conv_apply",
        "conv_outer",
        "cross_entropy",
        "cross_entropy_backward",
        "cross_entropy_double_backward",
        "cross_entropy_gradient",
        "cross_entropy_gradient_",
        "explain",
        "gelu_double_backward",
        "has_fast_form",
        "index_sqnorm",
        "multi_axpy_",
        "multi_dot",
        "multi_sqnorm",
        "norm_affine",
        "norm_affine_backward",
        "norm_affine_double_backward",
        "normalize",
        "normalize_backward",
        "normalize_double_backward",
        "outer_apply",
        "outer_sqnorm",
        "outer_sum",
        "registry",
        "segment_dot",
        "segment_sum",
        "sgd_step_",
    ]
else:
    # Other libraries ask for a package of this name (Hugging Face's) by importing it, and catch no error.
    __path__ = []

    def __getattr__(name: str) -> object:
        error = AttributeError if name.startswith("__") else ImportError
        raise error(
            f"this folder is imported as fastreg.kernels, not as {__name__!r} (install fastreg, for "
            "example with pip install -e ., and import fastreg.kernels)"
        )
