"""torch's rules for the tensors of a pickle: which are plain, and which have values that are not in their storage."""

from __future__ import annotations

from typing import Any

from mobile_vla_inference.policy.storage.formats.pickle_values import (
    ForeignTensor,
    Global,
    Instruction,
    PickledDict,
    PickledObject,
    Tensor,
)
from mobile_vla_inference.policy.storage.number_types import is_differentiable

#: Attributes of a tensor that are its values.
_VALUE_ATTRIBUTES = ("data", "real", "imag")

#: Classes whose values are those of a plain tensor.
PLAIN_CLASSES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.Parameter",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)

#: torch's functions that build tensors of other kinds: the kind, and how to save a plain tensor instead.
FOREIGN = {
    "torch._utils._rebuild_sparse_tensor": ("a sparse tensor", "after .to_dense()"),
    "torch._utils._rebuild_sparse_csr_tensor": ("a sparse tensor", "after .to_dense()"),
    "torch._utils._rebuild_qtensor": ("a quantized tensor", "after .dequantize()"),
    "torch._utils._rebuild_nested_tensor": ("a nested tensor", "as plain tensors"),
    "torch._utils._rebuild_mkldnn_tensor": ("an MKL-DNN tensor", "after .to_dense()"),
    "torch._utils._rebuild_meta_tensor_no_storage": ("a tensor on the meta device, without values", "with its values"),
    "torch._utils._rebuild_device_tensor_from_numpy": ("a numpy array of a tensor", "after .cpu()"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("a tensor of another kind of device", "after .cpu()"),
    "torch._utils._rebuild_xla_tensor": ("a tensor of an XLA device", "after .cpu()"),
    "torch._utils._rebuild_wrapper_subclass": ("a tensor of a class of its own", "as a plain torch.Tensor"),
}


def foreign_tensor(function: str, arguments: tuple[Any, ...]) -> ForeignTensor:
    """Describe the tensor that a call of a function of FOREIGN builds."""
    what, advice = FOREIGN[function]
    if function.endswith("_sparse_tensor") and arguments and isinstance(arguments[0], str):
        what += f" ({arguments[0][:40]})"
    elif function.endswith("_wrapper_subclass") and arguments and isinstance(arguments[0], Global):
        what = f"a tensor of the class {arguments[0].name[:80]}"
    return ForeignTensor(what, advice)


def with_gradient(value: Any, grad: Any) -> Tensor | ForeignTensor:
    """Return the tensor; refuse, as torch does, integers with gradients."""
    if not isinstance(value, (Tensor, ForeignTensor)) or not isinstance(grad, bool):
        raise Instruction("a parameter of an unknown kind")
    if grad and isinstance(value, Tensor) and not is_differentiable(value.dtype):
        raise Instruction(f"a gradient of {value.dtype}")
    return value


def with_metadata(tensor: Tensor | ForeignTensor, metadata: Any) -> Tensor | ForeignTensor:
    """Return the tensor, or a ForeignTensor if its metadata changes the stored values."""
    if not metadata or (isinstance(metadata, PickledDict) and not metadata.pairs):
        return tensor
    marks = ", ".join(sorted(map(str, metadata.named()))) if isinstance(metadata, PickledDict) else "unknown"
    return ForeignTensor(
        f"a tensor that is lazily changed ({marks[:40]})", "after .resolve_conj().resolve_neg(), as plain values"
    )


def with_attributes(tensor: Tensor | ForeignTensor, state: Any) -> Tensor | ForeignTensor:
    """Return the tensor, or a ForeignTensor if an attribute that was saved with it replaces its values."""
    for attributes in state if isinstance(state, tuple) else (state,):
        if attributes is None:
            continue
        if not isinstance(attributes, PickledDict) or isinstance(attributes, PickledObject):
            raise Instruction("a tensor with attributes of an unknown kind")
        for name, _ in attributes.pairs:
            if not isinstance(name, str):
                raise Instruction("a tensor with an attribute without a name")
            if name in _VALUE_ATTRIBUTES or name.startswith("__"):
                return ForeignTensor(f"a tensor whose attribute {name[:40]!r} replaces it", "as a plain torch.Tensor")
    return tensor
