"""What ends an answer is told by the chat template and the configuration files together, and must be told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from switchkd.export.assembly import export_checkpoint
from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.tracing import ExportError


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


NEVER_ENDING = "{% for message in messages %}{{ message['content'][-1]['text'] }} {% endfor %}"


@pytest.mark.parametrize(
    ("eos", "template", "ids", "told"),
    [
        (2, None, (2,), False),
        ([0, 2], None, (2, 0), False),  # the template's first: calibration ends answers with it
        (0, None, (2, 0), True),
        (0, NEVER_ENDING, (0,), False),
        (0, "{{ raise_exception('never') }}", (0,), False),
        (None, None, (2,), False),  # config.json's
    ],
)
def test_template_and_configuration_end_answers(
    checkpoint: Path, eos: Any, template: str | None, ids: tuple[int, ...], told: bool
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if template is not None:
        (checkpoint / "chat_template.jinja").write_text(template)
    source = open_checkpoint(checkpoint)
    assert source.ends.ids == source.facts().eos_token_ids == ids
    assert (source.ends.note is not None) == told


@pytest.mark.parametrize("eos", [[], -1, [2, -1], 300, [2, 300], "2", True, [None]])
def test_what_ends_no_answer_is_refused(checkpoint: Path, eos: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ExportError, match=r"eos_token_id is .*, expected one or more token ids from 0 to 299"):
        export_checkpoint(checkpoint, checkpoint.parent / "bundle")


def test_settings_that_are_none(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"repetition_penalty": -1}')
    with pytest.raises(ExportError, match=r"generation_config\.json: repetition_penalty is -1, expected a number"):
        export_checkpoint(checkpoint, checkpoint.parent / "bundle")
