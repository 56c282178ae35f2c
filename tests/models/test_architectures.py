"""The table of architectures is true and complete."""

from __future__ import annotations

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.architectures import DOCUMENT, document, row
from tests.helpers.families import EXAMPLES, FAMILIES, LEFT_OUT, model_type

TEXT = DOCUMENT.read_text()
INSTALLED = f"transformers {transformers.__version__}"
OF_INSTALLED = f" {INSTALLED}:" in TEXT


# Other tests check shapes, and checking them here takes half of the time.
@pytest.mark.usefixtures("unchecked")
# An older transformers uses it to import the code of GPT-BigCode.
@pytest.mark.filterwarnings("default:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_its_row_says(family: str) -> None:
    """Guards against a wrong token in an architecture that no other test covers, and against an outdated table.

    Another version of transformers may serve a family that the table refuses, or refuse one that it serves. It may not
    decode wrongly.
    """
    if model_type(family) not in CONFIG_MAPPING:
        pytest.skip(f"{INSTALLED} does not have the family")
    line = row(family)
    assert line in TEXT.splitlines() or not OF_INSTALLED


@pytest.mark.skipif(not OF_INSTALLED, reason=f"the table is not of {INSTALLED}")
def test_the_table_is_whole() -> None:
    """Guards against a family that is neither in the table nor listed as left out, and a page edited by hand."""
    named = {model_type(family) for family in FAMILIES}
    left_out = {name for names in LEFT_OUT.values() for name in names}
    assert named.isdisjoint(left_out)
    assert named | left_out == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(EXAMPLES) <= set(FAMILIES)
    rows = [line for family in FAMILIES for line in TEXT.splitlines() if line.startswith(f"| {family} |")]
    assert document(rows) == TEXT
