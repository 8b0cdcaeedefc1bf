"""Tools as somebody wrote them for DeepEyes; for it, the import reads `from verl.workers.agent.tool_envs import ...`."""

import json
import re

from PIL import ImageDraw

from megatron_agent.envs.base import ToolBase, extract_tool_call_contents

CHATML = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Notepad(ToolBase):
    """Text with the template's tokens in it; what was noted stays for the episode."""

    name = "notepad"

    def __init__(self, _name, _desc, _params, **kwargs):
        super().__init__(
            name=self.name,
            description="Remembers a line.",
            parameters={"type": "object", "properties": {"line": {"type": "string"}}, "required": ["line"]},
        )
        self.notes = None

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.notes = []
        self.question = raw_prompt[-1]["content"]

    def execute(self, action_string, **kwargs):
        if extract_tool_call_contents("<answer>", "</answer>", action_string):
            return "", 0.0, True, {}
        lines = extract_tool_call_contents("<note>", "</note>", action_string)
        if not lines:
            return CHATML.format("Error: nothing to note"), 0.0, False, {"status": "failed", "error": "nothing to note"}
        self.notes += [line.strip() for line in lines]
        return CHATML.format("Noted so far: " + "; ".join(self.notes)), 0.0, False, {"status": "success", "tool_used": "note"}


class Hint(ToolBase):
    """A chat list; without its own __init__, and a reward for asking."""

    name = "hint"

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.turns = 0

    def execute(self, action_string, **kwargs):
        self.turns += 1
        return [{"role": "user", "content": f"Hint {self.turns}: look at the left half."}], 0.1, False, {}


class Crop(ToolBase):
    """A text with its pictures beside it, cut from the original."""

    name = "crop"

    def __init__(self, _name, _desc, _params, **kwargs):
        self.multi_modal_data = None
        super().__init__(name=self.name)

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.multi_modal_data = origin_multi_modal_data
        assert "image" in self.multi_modal_data and len(self.multi_modal_data["image"]) > 0

    def execute(self, action_string, **kwargs):
        action_list = extract_tool_call_contents("<tool_call>", "</tool_call>", action_string)
        if not action_list:
            return "", 0.0, True, {}
        try:
            boxes = [json.loads(action)["arguments"]["bbox"] for action in action_list]
            images = [self.multi_modal_data["image"][0].crop(box) for box in boxes]
        except Exception as err:
            return CHATML.format(f"Error: {err}"), 0.0, False, {"error": str(err), "status": "failed"}
        message = "".join("<tool_response><image></tool_response>\n" for _ in images)
        observation = {"prompt": CHATML.format(message), "multi_modal_data": {"image": images}}
        return observation, 0.0, False, {"status": "success", "tool_used": "crop"}


class Marker(ToolBase):
    """A chat with a picture that every turn draws on, so that the marks add up; takes no more than it needs."""

    name = "marker"

    def __init__(self, _name, _desc, _params, **kwargs):
        super().__init__(name=self.name)

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data):
        self.canvas = multi_modal_data["image"][0]

    def execute(self, action_string, **kwargs):
        box = [int(number) for number in re.findall(r"\d+", action_string)[-4:]]
        ImageDraw.Draw(self.canvas).rectangle(box, outline=(255, 0, 0), width=2)
        chat = [{"role": "user", "content": "<image>\nMarked."}, {"role": "user", "content": "Go on."}]
        return {"chat": chat, "multi_modal_data": {"image": [self.canvas]}}, 0.0, False, {"status": "success"}


class Guess(ToolBase):
    """A game: it is played over turns, pays for each, and ends by itself with an observation that nobody reads."""

    name = "guess"

    def __init__(self, _name, _desc, _params, **kwargs):
        super().__init__(name=self.name)

    def reset(self, **kwargs):
        self.low, self.high, self.secret = 0, 100, 37
        assert kwargs["raw_prompt"][-1]["role"] == "user"

    def execute(self, action_string, **kwargs):
        number = int(re.search(r"\d+", action_string).group())
        if number == self.secret:
            return "Right!", 1.0, True, {"status": "success"}
        self.low, self.high = (number, self.high) if number < self.secret else (self.low, number)
        return CHATML.format(f"It lies between {self.low} and {self.high}."), -0.1, False, {"status": "success"}
