"""A pretend accelerator, written in Python: it shows whether a tensor is on the wrong side.

Its tensors hold a tensor of the CPU, and refuse what a GPU's would refuse (and float64, as Apple's
MPS does). Where torch.set_float32_matmul_precision allows it, it multiplies as TF32 units do.
Importing it makes torch.device("pretend"). It leans on PyTorch's experimental support for devices
in Python (torch.utils.backend_registration, as of 2.13)."""
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule, _setup_privateuseone_for_python_backend)


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", Module())
DEVICE = torch.device("pretend", 0)
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default,
            torch.ops.aten.index_put.default}
operations = 0                                              # how many were computed here


class PretendTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(),
                                                     storage_offset=held.storage_offset(),
                                                     dtype=held.dtype, device=DEVICE)
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, form):
        return format(self.held, form)

    # saved as what torch.load(map_location="cpu") would make of it
    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        global operations
        operations += 1
        options = dict(options or {})
        leaves = tree_leaves((arguments, options))
        mixed = [] if operation in COPIES else leaves
        if operation in INDEXING and isinstance(arguments[0], cls):
            mixed = [arguments[0], *arguments[2:]]           # an index may lie on the CPU
        if any(type(leaf) is not cls and isinstance(leaf, torch.Tensor) and leaf.dim() > 0
               for leaf in mixed):
            raise RuntimeError(f"{operation} on tensors of pretend and of the CPU")
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{operation} on pretend with a generator of the CPU")
        target = torch.device(options["device"]) if options.get("device") is not None else DEVICE
        if target.type == "pretend" and "device" in options:
            options["device"] = torch.device("cpu")
        held = tree_map(hold, arguments)
        if operation in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            held = (*held[:-2], *map(tf32, held[-2:]))
        result = operation(*held, **tree_map(hold, options))
        if target.type == "pretend" and any(isinstance(leaf, torch.Tensor)
                                            and leaf.dtype == torch.float64
                                            for leaf in tree_leaves(result)):
            raise TypeError(f"{operation} in float64, which Apple's MPS does not have")
        if target.type != "pretend" or isinstance(arguments[0], torch.Tensor) and type(
            arguments[0]) is not cls:
            return result.clone() if operation is torch.ops.aten._to_copy.default else arguments[0]
        return return_and_correct_aliasing(operation, arguments, options,
                                           tree_map(lambda leaf: cls(leaf)
                                                    if isinstance(leaf, torch.Tensor) else leaf,
                                                    result))


# the factors come last
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}


def tf32(factor):
    """A factor as CUDA's TF32 units read it: float32 with 10 bits of fraction."""
    if factor.dtype != torch.float32:
        return factor
    bits = factor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def hold(leaf):
    return leaf.held if isinstance(leaf, PretendTensor) else leaf


aten = torch.library.Library("aten", "IMPL")
aten.impl("empty.memory_format", lambda size, dtype=None, layout=None, device=None, pin_memory=None,
          memory_format=None: PretendTensor(torch.empty(size, dtype=dtype)), "PrivateUse1")
aten.impl("empty_strided", lambda size, stride, dtype=None, layout=None, device=None,
          pin_memory=None: PretendTensor(torch.empty_strided(size, stride, dtype=dtype)),
          "PrivateUse1")
aten.impl("_copy_from", lambda source, target,
          non_blocking=False: hold(target).copy_(hold(source)) is None or target, "PrivateUse1")
# tensors written in Python can't be made in inference mode
torch.inference_mode = torch.no_grad


# Autocast as CUDA has it: what it computes in half precision, what in float32 (PyTorch's "Autocast
# Op Reference"), of the operations
# that the notebook may use. That CUDA's autocast treats each of them is checked below.
HALVED = "addmm addmv addr matmul mm mv linear addbmm baddbmm bmm"
RAISED = (
    "exp expm1 log log2 log10 log1p reciprocal rsqrt pow.Tensor_Scalar pow.Tensor_Tensor "
    "pow.Scalar softplus nll_loss logsumexp "
          "layer_norm native_layer_norm norm.Scalar norm.ScalarOpt_dim cumsum softmax.int "
          "log_softmax.int sum sum.dim_IntList prod prod.dim_int "
          "linalg_vector_norm cumprod")
WIDEST = "addcmul addcdiv dot index_put scatter_add"


def cast_for(name):
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def cast(leaf, dtype):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point(
            ) and leaf.device.type == "pretend" and leaf.dtype != torch.float64:
            return leaf.to(dtype)
        return leaf

    def kernel(*arguments, **options):
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            floats = [leaf.dtype for leaf in tree_leaves(arguments)
                      if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
            widest = torch.float32 if name in RAISED.split() or torch.float32 in floats else floats[
                0]
            dtype = torch.get_autocast_dtype("pretend") if name in HALVED.split() else widest
            return operation(*tree_map(lambda leaf: cast(leaf, dtype), arguments), **options)
    return kernel


fall_through = torch.library.Library("_", "IMPL")
fall_through.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for name in f"{HALVED} {RAISED} {WIDEST}".split():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA"), name
    aten.impl(name, cast_for(name), "AutocastPrivateUse1")
