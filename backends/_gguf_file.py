"""Writing ``model.gguf``: what a decoder's tensors are called in a format, and one tensor after the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from surgeon.backends._gguf_blocks import FLOATS, Form, block_kind, encode, floats, form, scale_rounding, unspoken
from surgeon.backends._gguf_formats import Format, Turning, turning
from surgeon.backends._gguf_parts import AttentionPart, Decoder, FeedForward, Matrix, Mixture, Norm, times
from surgeon.numerics import QuantizedTensor

if TYPE_CHECKING:
    from surgeon.backends._gguf_vocabulary import Vocabulary

_EMPTY = 32
"""Width of a shared expert of zeros, for a format that always has one: one block."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: what the format calls it.
        value: a matrix, or numbers that are written as float32.
    """

    name: str
    value: Matrix | Tensor


def entries(decoder: Decoder, format: Format) -> Iterator[Entry]:
    """Every tensor of the file, in its order."""
    from gguf import TENSOR_NAMES
    from gguf.constants import MODEL_TENSOR as T  # a short name for what is named twenty times

    def name(tensor: Any, block: int | None = None, what: str = "weight") -> str:
        return f"{TENSOR_NAMES[tensor].format(bid=block)}.{what}"

    def normed(tensor: Any, norm: Norm | None, block: int | None = None) -> Iterator[Entry]:
        if norm is not None:
            yield Entry(name(tensor, block), norm.weight)
            if format.norm == "layer":
                yield Entry(name(tensor, block, "bias"), torch.zeros_like(norm.weight) if norm.bias is None else norm.bias)

    def product(tensor: Any, matrix: Matrix, block: int, key: str = "") -> Iterator[Entry]:
        yield Entry(name(tensor, block), matrix)
        if matrix.bias is not None or key in format.required:
            yield Entry(name(tensor, block, "bias"), torch.zeros(matrix.shape[0]) if matrix.bias is None else matrix.bias)

    embedding = decoder.embedding
    if format.scaled:
        embedding = replace(embedding, factor=1.0)
    yield Entry(name(T.TOKEN_EMBD), embedding)
    if decoder.positions is not None:
        yield Entry(name(T.POS_EMBD), decoder.positions)
    first = decoder.layers[0].attention
    turns = turning(first.rotation, first.head_dim, format)
    assert isinstance(turns, Turning)
    if turns.factors is not None:
        yield Entry(name(T.ROPE_FREQS), turns.factors)
    for block, layer in enumerate(decoder.layers):
        part = scaled(layer.attention)
        q, k = (_turned(matrix, part.head_dim, turns) for matrix in (part.q, part.k))
        yield from normed(T.ATTN_NORM, part.pre, block)
        if format.fused:
            yield from product(T.ATTN_QKV, _joined([q, k, part.v]), block, "q")
        else:
            for tensor, key, matrix in ((T.ATTN_Q, "q", q), (T.ATTN_K, "k", k), (T.ATTN_V, "v", part.v)):
                yield from product(tensor, matrix, block, key)
        yield from normed(T.ATTN_Q_NORM, _turned_norm(part.q_norm, part, turns), block)
        yield from normed(T.ATTN_K_NORM, _turned_norm(part.k_norm, part, turns), block)
        yield from product(T.ATTN_OUT, part.o, block, "o")
        yield from normed(T.ATTN_POST_NORM, part.post, block)
        yield from normed(T.FFN_NORM, layer.ffn.pre, block)
        yield from normed(T.FFN_POST_NORM, layer.ffn.post, block)
        if isinstance(layer.ffn, FeedForward):
            gate = [(T.FFN_GATE, "gate", layer.ffn.gate)] if layer.ffn.gate is not None else []
            for tensor, key, matrix in (*gate, (T.FFN_UP, "up", layer.ffn.up), (T.FFN_DOWN, "down", layer.ffn.down)):
                yield from product(tensor, matrix, block, key)
            continue
        mixture = layer.ffn
        yield Entry(name(T.FFN_GATE_INP, block), mixture.router.dense())
        if mixture.gate is not None:
            yield Entry(name(T.FFN_GATE_EXP, block), mixture.gate)
        yield Entry(name(T.FFN_UP_EXP, block), mixture.up)
        yield Entry(name(T.FFN_DOWN_EXP, block), mixture.down)
        if format.shared is not None:
            shared, gate_row = shared_of(mixture, decoder, format)
            assert shared.gate is not None
            if gate_row is not None:
                yield Entry(name(T.FFN_GATE_INP_SHEXP, block), gate_row)
            yield Entry(name(T.FFN_GATE_SHEXP, block), shared.gate)
            yield Entry(name(T.FFN_UP_SHEXP, block), shared.up)
            yield Entry(name(T.FFN_DOWN_SHEXP, block), shared.down)
    yield from normed(T.OUTPUT_NORM, decoder.norm)
    if not (decoder.tied and (format.tied == "must" or (format.tied == "may" and embedding.factor == decoder.head.factor))):
        yield Entry(name(T.OUTPUT), decoder.head)


def scaled(part: AttentionPart) -> AttentionPart:
    """Attention whose scores have every format's factor 1 / sqrt(D): another goes into queries, or into their norm."""
    factor = part.scale * part.head_dim**0.5
    if math.isclose(factor, 1, rel_tol=1e-6):
        return part
    if part.q_norm is not None:
        bias = None if part.q_norm.bias is None else part.q_norm.bias * factor
        return replace(part, q_norm=replace(part.q_norm, weight=part.q_norm.weight * factor, bias=bias))
    return replace(part, q=times(part.q, factor))


def _turned(matrix: Matrix, size: int, turns: Turning) -> Matrix:
    """Queries or keys with the numbers of each head in the format's order."""
    if torch.equal(turns.order, torch.arange(size)):
        return matrix
    index = (torch.arange(matrix.shape[0] // size)[:, None] * size + turns.order).flatten()
    rows = index if matrix.rows is None else matrix.rows[index]
    return replace(matrix, rows=rows, bias=None if matrix.bias is None else matrix.bias[index])


def _turned_norm(norm: Norm | None, part: AttentionPart, turns: Turning) -> Norm | None:
    if norm is None:
        return None
    index = (torch.arange(len(norm.weight) // part.head_dim)[:, None] * part.head_dim + turns.order).flatten()
    return replace(norm, weight=norm.weight[index], bias=None if norm.bias is None else norm.bias[index])


def _joined(parts: list[Matrix]) -> Matrix:
    """Matrices over one input as one, their rows behind each other."""
    first = parts[0]
    biases = None
    if any(part.bias is not None for part in parts):
        biases = torch.cat([torch.zeros(p.shape[0]) if p.bias is None else p.bias.float() for p in parts])
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    codes = _joined_codes(parts)
    return Matrix(first.label, shape, lambda: torch.cat([part.dense() for part in parts]), codes, bias=biases)


def _joined_codes(parts: list[Matrix]) -> QuantizedTensor | None:
    """Codes of several matrices behind each other, None where they are not of one form."""
    held = [part.codes for part in parts if part.codes is not None]
    if len(held) < len(parts) or len({(codes.bits, codes.group, codes.zero_point is None) for codes in held}) > 1:
        return None
    if len({part.factor for part in parts}) > 1:
        return None

    def taken(tensor: Tensor, part: Matrix) -> Tensor:
        return tensor if part.rows is None else tensor[part.rows]

    pairs = list(zip(held, parts, strict=True))
    zeros = [taken(codes.zero_point, part) for codes, part in pairs if codes.zero_point is not None]
    return replace(
        held[0],
        packed=torch.cat([taken(codes.packed, part) for codes, part in pairs]),
        scale=torch.cat([taken(codes.scale * part.factor, part) for codes, part in pairs]),
        zero_point=torch.cat(zeros) if zeros else None,
    )


def shared_of(mixture: Mixture, decoder: Decoder, format: Format) -> tuple[FeedForward, Tensor | None]:
    """The shared expert that a format always has, and the row of its gate.

    Without one: zeros.  Without a gate in a format that has one: the sigmoid of zeros is 1/2, and the down matrix is doubled.
    A format whose shared experts are as wide as the others gets as many of them, with zeros behind.
    """
    hidden = decoder.embedding.shape[1]
    unit = mixture.width if format.shared == "plain" else 1
    shared = mixture.shared
    width = unit * -(-(_EMPTY if format.shared == "gated" else 1) // unit) if shared is None else shared.width
    if shared is None:
        label, dtype = f"{mixture.site}.shared", mixture.up.make().dtype
        inward = Matrix(label, (width, hidden), lambda: torch.zeros(width, hidden, dtype=dtype))
        outward = Matrix(label, (hidden, width), lambda: torch.zeros(hidden, width, dtype=dtype))
        shared = FeedForward(label, inward, outward, inward, mixture.activation, width)
    elif width % unit:
        more = unit - width % unit
        gate = None if shared.gate is None else _wider(shared.gate, 0, more)
        up, down = _wider(shared.up, 0, more), _wider(shared.down, 1, more)
        shared = replace(shared, up=up, gate=gate, down=down, width=width + more)
    if format.shared == "plain":
        return shared, None
    if mixture.shared_gate is not None:
        return shared, mixture.shared_gate.dense().reshape(-1)
    return replace(shared, down=replace(shared.down, factor=2 * shared.down.factor)), torch.zeros(hidden)


def _wider(matrix: Matrix, axis: int, more: int) -> Matrix:
    """A matrix with zeros behind it; floats."""
    shape = list(matrix.shape)
    shape[axis] += more

    def make() -> Tensor:
        found = matrix.dense()
        return torch.nn.functional.pad(found, (0, 0, 0, more) if axis == 0 else (0, more))

    return Matrix(matrix.label, tuple(shape), make)


# -- types ----------------------------------------------------------------------------------------------------------


def stored(entry: Entry, dtype: str, low_bit: str) -> Form | str:
    """How a tensor is stored, or why it cannot be."""
    value = entry.value
    if isinstance(value, Tensor):
        return form("F32", tuple(value.shape))
    if value.codes is not None:
        problem = unspoken(value)
        if problem is None:
            return form(block_kind(value.codes), value.shape)
        if low_bit == "blocks":
            return problem
    return form(_float_kind(value, dtype), value.shape)


def _float_kind(matrix: Matrix, dtype: str) -> str:
    if dtype != "auto":
        return FLOATS[dtype]
    made = matrix.codes.scale.dtype if matrix.codes is not None else _probe(matrix)
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(made, "F32")


def _probe(matrix: Matrix) -> torch.dtype:
    return matrix.make().dtype


# -- writing --------------------------------------------------------------------------------------------------------


def write(
    decoder: Decoder, format: Format, path: Path, *, dtype: str, low_bit: str, name: str, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Write the file, one tensor at a time.

    Args:
        decoder: what is written.
        format: which it is of.
        path: of the file.
        dtype: of float matrices.
        low_bit: whether low-bit weights that no block holds are floats.
        name: what the file calls the model.
        vocabulary: see ``_gguf_vocabulary``.

    Returns:
        Facts for the report.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), format.name)
    listed = list(entries(decoder, format))
    forms = []
    moved = 0.0
    for entry in listed:
        found = stored(entry, dtype, low_bit)
        assert isinstance(found, Form), found
        forms.append(found)
        if isinstance(entry.value, Matrix) and found.kind.startswith("Q") and entry.value.codes is not None:
            moved = max(moved, scale_rounding(entry.value.codes, entry.value.factor))
    _describe(writer, decoder, format, forms, name)
    vocabulary.write(writer)
    for entry, found in zip(listed, forms, strict=True):
        kind = gguf.GGMLQuantizationType[found.kind]
        writer.add_tensor_info(entry.name, found.shape, numpy.dtype("float32"), found.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, found in zip(listed, forms, strict=True):
        value = entry.value
        writer.write_tensor_data(floats(value, "F32") if isinstance(value, Tensor) else encode(value, found.kind))
    writer.close()
    types = Counter(found.kind for found in forms)
    notes = list(decoder.notes)
    for entry, found in zip(listed, forms, strict=True):
        if isinstance(entry.value, Matrix) and entry.value.codes is not None and found.kind in FLOATS.values():
            notes.append(f"{entry.value.label} is written as {found.kind}: {unspoken(entry.value)}")
    return {
        "architecture": format.name,
        "tensors": len(listed),
        "types": dict(sorted(types.items())),
        **({"scale_rounding": moved} if any(kind.startswith("Q") for kind in types) else {}),
        "context_length": decoder.context,
        "notes": notes,
    }


def _describe(writer: Any, decoder: Decoder, format: Format, forms: list[Form], name: str) -> None:
    """The keys that say what the architecture's code needs to know."""
    import gguf

    first, layer = decoder.layers[0].attention, decoder.layers[0]
    attentions = [each.attention for each in decoder.layers]
    writer.add_name(name)
    types = Counter(found.kind for found in forms if len(found.shape) > 1)
    main = max(types, key=lambda kind: types[kind])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if main == "F32" else gguf.LlamaFileType[f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(decoder.layers))
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.embedding.shape[1])
    writer.add_vocab_size(decoder.embedding.shape[0])
    heads, kv_heads = [each.heads for each in attentions], [each.kv_heads for each in attentions]
    writer.add_head_count(heads if format.by_layer else heads[0])
    writer.add_head_count_kv(kv_heads if format.by_layer else kv_heads[0])
    writer.add_key_length(first.head_dim)
    writer.add_value_length(first.head_dim)
    eps = decoder.norm.eps if decoder.norm is not None else 0.0
    (writer.add_layer_norm_rms_eps if format.norm == "rms" else writer.add_layer_norm_eps)(eps)
    turns = turning(first.rotation, first.head_dim, format)
    assert isinstance(turns, Turning)
    if format.order is not None:
        writer.add_rope_dimension_count(first.head_dim)
        writer.add_rope_freq_base(turns.base)
        if turns.scale != 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(1 / turns.scale)
    if isinstance(layer.ffn, Mixture):
        writer.add_feed_forward_length(layer.ffn.width)
        writer.add_expert_feed_forward_length(layer.ffn.width)
        writer.add_expert_count(layer.ffn.experts)
        writer.add_expert_used_count(layer.ffn.top_k)
        if format.shared is not None:
            shared, _ = shared_of(layer.ffn, decoder, format)
            writer.add_expert_shared_feed_forward_length(shared.width)
            if format.shared == "plain":
                writer.add_expert_shared_count(shared.width // layer.ffn.width)
        if format.experts == "either":
            writer.add_expert_weights_norm(layer.ffn.weights == "softmax")
            writer.add_expert_weights_scale(1.0)
    else:
        widths = [each.ffn.width for each in decoder.layers]
        writer.add_feed_forward_length(widths if format.by_layer else widths[0])
