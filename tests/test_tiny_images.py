"""The tiny recipes of images, trained to their end, beat trivial baselines on held-out data; the untrained networks do not.

Three files for the tiny recipes, since tests of one file run one after another.
"""

import pytest
from tiny_recipes import check_recipe


@pytest.mark.slow
@pytest.mark.parametrize(("system", "margin"), [("rectok", 0.5), ("uniflow", 0.5)])      # measured: 1.3 dB, 1.5 dB
def test_a_tiny_recipe_beats_its_baseline(tmp_path, system, margin):
    check_recipe(tmp_path, system, "psnr", 1, margin)
