"""What the tuning and ensemble tools share: a trained model with rows, comparisons, encoder states kept for reuse."""

from __future__ import annotations

import dataclasses

import pytest
import runs
import tiny
import torch
from trials import METRICS, Decoding, Scored, _EncoderMemory, comparison, encoder_remembered, open_subject

from engine.errors import EngineError
from engine.generation.api import generate_all
from engine.generation.settings import GenerationSettings


@pytest.mark.slow
def test_encoder_states_are_reused_and_tokens_stay_the_same():
    for family in ("bart", "t5"):
        model = tiny.model(family)
        generator = torch.Generator().manual_seed(3)
        prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (9, 4, 12, 7, 5)]

        def decode(beams: int, model=model, prompts=prompts):
            settings = GenerationSettings.resolve(
                {"num_beams": beams, "max_new_tokens": 6},
                model_generation_config=model.generation_config,
                is_encoder_decoder=True,
            )
            found = generate_all(model, prompts, settings, pad_token_id=0, max_batch_size=beams)
            return [h[0].token_ids for h in found]

        plain = [decode(beams) for beams in (2, 3)]
        with encoder_remembered(model):
            assert [decode(beams) for beams in (2, 3, 2)] == [*plain, plain[0]]
        assert "forward" not in vars(model.get_encoder())
        assert [decode(2)] == plain[:1]


def test_encoder_memory_answers_known_rows_and_keeps_within_its_room():
    model = tiny.model("bart")
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = (ids != 0).long()
    memory = _EncoderMemory(model.get_encoder().forward, most_bytes=1 << 20)
    first = memory(input_ids=ids, attention_mask=mask, return_dict=True)[0]
    again = memory(input_ids=ids, attention_mask=mask, return_dict=True)[0]
    assert (memory.calls, memory.answered) == (2, 1)
    assert torch.equal(again[mask.bool()], first[mask.bool()]) and not again[1, 2].any()
    alone = memory(input_ids=ids[1:, :2], attention_mask=mask[1:, :2], return_dict=True)[0]
    assert memory.answered == 2 and torch.equal(alone[0], first[1, :2])
    small = _EncoderMemory(model.get_encoder().forward, most_bytes=3 * 32 * 4)
    small(input_ids=ids, attention_mask=mask)
    assert len(small.states) == 1 and small.room == 0


def test_comparison_shows_the_gain_over_each_member():
    rows = [[dict.fromkeys(METRICS, v) for v in values] for values in ([3.0, 5.0], [1.0, 3.0], [2.0, 4.0])]
    lines = comparison(Scored("all", rows[0], 2.0), [Scored("a", rows[1]), Scored("b", rows[2])], "rouge1")
    assert "+2.00 [+2.00, +2.00]" in lines[1] and "+1.00 [+1.00, +1.00]" in lines[2]
    assert lines[3].startswith("all") and lines[3].endswith("2.0") and len({len(line) for line in lines}) == 1


def test_trials_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decoding([], [], 0, 0.0).seconds = 1.0


def test_a_subject_is_a_run_with_the_rows_of_its_recipe(tmp_path):
    tiny.save("bart", tmp_path / "run" / "final_model")
    recipe = runs.write_recipe(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    subject = open_subject(tmp_path / "run", device="cpu", limit=3)
    assert (subject.home, subject.folder) == (tmp_path / "run", tmp_path / "run" / "final_model")
    assert (subject.source, len(subject.examples), len(subject.prompts)) == ("dev.jsonl", 3, 3)
    assert subject.recipe.generation.max_new_tokens == 6 and subject.labelled
    decoding = subject.decode(subject.summarizer(subject.generation(["generation.num_beams=1"])))
    assert len(decoding.texts) == 3 and decoding.tokens > 0
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(EngineError, match=r"E2\.60"):
        open_subject(tmp_path / "run", device="cpu")
