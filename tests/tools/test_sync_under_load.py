"""Weight syncs while requests keep a real vLLM engine busy: every token stamped with the weights that made it.

A few rounds; the fifty of `tools/check_sync.py --load 50` are left to a call by hand, and so are larger layouts.
"""

import pytest

from tests.tools.test_check_sync import check_sync

pytestmark = pytest.mark.integration


def test_every_token_is_stamped_with_its_weights(small_quickstart):
    done = check_sync("--hf", str(small_quickstart / "model"), "--train", "one", "--load", "4")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 versions" in done.stdout and done.stdout.endswith("0 things wrong\n")
