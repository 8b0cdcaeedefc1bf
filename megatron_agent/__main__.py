import sys

from megatron_agent.cli import main

sys.exit(main())
