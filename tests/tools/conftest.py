"""What the programs of tools/ are run on."""

from tests.integration.conftest import small_quickstart  # noqa: F401 (a fixture)
