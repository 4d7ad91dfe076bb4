"""The tiny recipes of codecs that read, or are read, trained to their end, beat a trivial baseline on held-out clips."""

import pytest
from tiny_recipes import check_recipe


@pytest.mark.slow
@pytest.mark.parametrize(("system", "margin"), [("tadicodec", 0.05), ("xy_tokenizer", 0.1)])      # measured: 0.15, 0.46
def test_a_tiny_recipe_beats_its_baseline(tmp_path, system, margin):
    check_recipe(tmp_path, system, "mel", -1, margin)
