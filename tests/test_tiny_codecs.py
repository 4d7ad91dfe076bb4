"""The tiny recipes of codecs that know no text, trained to their end, beat a trivial baseline on held-out clips."""

import pytest
from tiny_recipes import check_recipe


@pytest.mark.slow
@pytest.mark.parametrize(("system", "margin"), [("dm_codec", 0.1), ("lm_spt", 0.1)])      # measured: 0.28, 0.33
def test_a_tiny_recipe_beats_its_baseline(tmp_path, system, margin):
    check_recipe(tmp_path, system, "mel", -1, margin)
