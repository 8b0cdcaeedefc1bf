"""`vl_agent_v1` under the name that DeepEyes' own datasets give it."""

from megatron_agent.envs.vl_agent_v1 import VLAgentV1


class VLAgent(VLAgentV1):
    name = "vl_agent"


COMPONENT = VLAgent
