"""Example inputs that surgeon makes itself, from a signature and a configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import TraceError
from surgeon.example_inputs import agreed_dims, default_inputs
from surgeon.example_layouts import layouts
from surgeon.fake import with_fake_weights
from surgeon.tracing import trace


class _Model(nn.Module):
    """What a model of transformers shows of itself; counts how often it runs."""

    main_input_name: Any = "input_ids"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**{"vocab_size": 30, "hidden_size": 8, **fields})
        self.embedding = nn.Embedding(30, 8)
        self.runs = 0

    def read(self, input_ids: Tensor) -> Tensor:
        self.runs += 1
        found: Tensor = self.embedding(input_ids)
        return found


class _Text(_Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.read(input_ids)


def test_a_model_of_tokens_is_not_run_for_its_inputs() -> None:
    model = _Text()
    assert {name: list(t.shape) for name, t in default_inputs(model).items()} == {"input_ids": [2, 7], "attention_mask": [2, 7]}
    assert model.runs == 0


class _Codebooks(_Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.read(input_ids.reshape(-1, self.config.num_codebooks, input_ids.shape[-1])).sum(1)
        return hidden if attention_mask is None else hidden * attention_mask[..., None]


class _Columns(_Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[2] != self.config.num_codebooks + 1:
            raise ValueError("one column for each codebook, and one for the text")
        return self.read(input_ids).sum(2)


@pytest.mark.parametrize(("kind", "shape"), [(_Codebooks, [8, 7]), (_Columns, [2, 7, 5])])
def test_ids_of_several_codebooks(kind: type[_Model], shape: list[int]) -> None:
    assert list(default_inputs(kind(num_codebooks=4))["input_ids"].shape) == shape


def test_dimensions_of_one_name_and_two_sizes_stay_fixed() -> None:
    inputs = {"input_ids": torch.zeros(8, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    assert agreed_dims(inputs) == {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}
    graph = trace(_Codebooks(num_codebooks=4).eval())
    assert [port.shape for port in graph.inputs] == [(8, "sequence"), (2, "sequence")]


def test_boxes_and_columns_of_codebooks_are_as_long_as_their_texts() -> None:
    class Boxed(_Model):
        def forward(self, input_ids: Tensor, bbox: Tensor) -> Tensor:
            return self.read(input_ids) + bbox.sum(-1, keepdim=True)

    graph = trace(Boxed().eval())
    assert [port.shape for port in graph.inputs] == [("batch", "sequence"), ("batch", "sequence", 4)]


class _Beside(_Model):
    """Refuses to run without what the signature calls optional."""

    def forward(self, input_ids: Tensor, visual_feats: Tensor | None = None, visual_pos: Tensor | None = None) -> Tensor:
        if visual_feats is None or visual_pos is None:
            raise ValueError("`visual_feats` cannot be `None`")
        assert visual_feats.shape[-1] == 12
        assert visual_pos.shape[-1] == 4
        return self.read(input_ids)


def test_an_argument_whose_width_the_configuration_gives() -> None:
    found = default_inputs(_Beside(visual_feat_dim=12, visual_pos_dim=4))
    assert list(found) == ["input_ids", "visual_feats", "visual_pos"]
    with pytest.raises(TraceError, match=r"runs on none of input_ids \[2, 7\]; .*visual_feats. cannot be"):
        default_inputs(_Beside(visual_feat_dim=12))


class _Placed(_Model):
    """An image of four features takes the place of four tokens, or the model refuses."""

    main_input_name = "pixel_values"

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.new_ones(len(pixel_values), 4, 8)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != self.get_image_features(pixel_values).numel() // 8:
            raise ValueError("image features and image tokens do not match")
        assert attention_mask is not None
        assert attention_mask.shape == input_ids.shape
        return self.read(input_ids)


def test_texts_hold_as_many_tokens_of_an_image_as_it_has_features() -> None:
    found = default_inputs(_Placed(image_token_id=29, image_size=16, num_channels=3))
    assert list(found["pixel_values"].shape) == [2, 3, 16, 16]
    assert (found["input_ids"] == 29).sum(1).tolist() == [4, 4]
    assert list(found["input_ids"].shape) == [2, 4 + 7]


class _Patched(_Model):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        assert int(spatial_shapes[0].prod()) == pixel_values.shape[1] == pixel_attention_mask.shape[1]
        assert pixel_values.shape[2] == 3 * 4 * 4
        return pixel_values


def test_images_that_come_in_patches() -> None:
    found = default_inputs(_Patched(num_channels=3, patch_size=4, num_patches=9, image_size=16))
    assert list(found["pixel_values"].shape) == [2, 9, 48]
    assert found["spatial_shapes"].tolist() == [[3, 3], [3, 3]]


class _Pairs(_Model):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError("pairs of images")
        return pixel_values


def test_images_of_no_said_size_are_tried_alone_and_in_pairs() -> None:
    assert list(default_inputs(_Pairs())["pixel_values"].shape) == [2, 2, 3, 224, 224]


class _Whole(_Model):
    """Speech to text, whose main input is that of its encoder."""

    main_input_name = "inputs"

    def __init__(self, **fields: Any) -> None:
        super().__init__(is_encoder_decoder=True, **fields)
        self.encoder = nn.Identity()
        self.encoder.main_input_name = "input_values"

    def forward(self, inputs: Any = None, input_values: Any = None, decoder_input_ids: Any = None) -> Tensor:
        assert inputs is None
        assert input_values is not None
        return self.read(decoder_input_ids)


def test_the_main_input_is_the_encoders_where_the_whole_has_none_of_a_known_kind() -> None:
    assert {name: t.dim() for name, t in default_inputs(_Whole()).items()} == {"input_values": 2, "decoder_input_ids": 2}


class _Needed(_Model):
    def forward(self, input_ids: Tensor, query_input_ids: Tensor, question_type_ids: Tensor, past_states: Tensor) -> Tensor:
        assert int(query_input_ids.max()) < 5
        assert past_states.shape[-1] == 6
        return self.read(input_ids)


def test_what_has_no_default_is_made_by_the_end_of_its_name() -> None:
    found = default_inputs(_Needed(query_config=SimpleNamespace(vocab_size=5), past_state_dim=6))
    assert set(found) == {"input_ids", "query_input_ids", "question_type_ids", "past_states"}
    with pytest.raises(TraceError, match="not here for past_states: pass inputs="):
        default_inputs(_Needed())


class _Deciding(_Model):
    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        hidden = self.read(input_ids)
        if bool((hidden > 0).all()):
            raise ValueError("not decided by shapes")
        return hidden


def test_what_only_values_decide_does_not_rule_out_inputs_of_fake_weights() -> None:
    found = default_inputs(with_fake_weights(_Deciding(image_size=16, num_channels=3)))
    assert list(found) == ["input_ids"]


def test_series_reach_back_by_the_longest_lag() -> None:
    config = SimpleNamespace(context_length=10, lags_sequence=[1, 4], input_size=1, num_time_features=3, prediction_length=6)
    assert [list(t.shape) for t in layouts("past_values", config)] == [[2, 14], [2, 14, 1]]
    assert [list(t.shape) for t in layouts("past_time_features", config)] == [[2, 14, 3]]
    assert [list(t.shape) for t in layouts("future_values", config)] == [[2, 6], [2, 6, 1]]
    assert [list(t.shape) for t in layouts("future_time_features", config)] == [[2, 6, 3]]
    assert layouts("past_time_features", SimpleNamespace()) == []


def test_boxes_end_right_of_and_below_where_they_start() -> None:
    (boxes,) = layouts("bbox", SimpleNamespace())
    assert boxes.dtype == torch.int64
    assert bool((boxes[..., 2:] > boxes[..., :2]).all())
