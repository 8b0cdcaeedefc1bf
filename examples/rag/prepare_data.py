"""Make the retrieval example: `python -m examples.rag.prepare_data --seed 0 --out data/rag/seed0`.

A corpus of invented facts says where people live, where they were born, what towns are famous for and what lies near
them. "What is the home of Mira Olsen famous for?" takes two searches: one for the home, one for what it is famous for.
Nobody's home is in more than one split, so what held-out questions ask for was never an answer before.

Written below the output folder, from the seed alone:

- `model/`: a Qwen2.5 of under a million parameters with random weights (../tiny_text.py).
- `corpus.jsonl`: one fact a line, for retriever_server.py.
- `warmup.parquet`: scripted conversations for a supervised warm start. They search in the right words and read what they
  find; but asked for a home's fame, most of them guess it after the first search.
- `train.parquet`: questions for reinforcement learning, without scripts. Reward has to teach the second search.
- `heldout.parquet`: questions about other people and other towns.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from examples.tiny_text import prepare, write_rows, write_text_model

FIRST = [
    "Mira", "Tomas", "Bela", "Ines", "Oskar", "Nadia", "Pavel", "Lena", "Hugo", "Vera", "Emil", "Rosa", "Anton", "Clara",
    "Dario", "Edda", "Felix", "Greta", "Ivo", "Jana", "Karl", "Livia", "Milo", "Nora",
]  # fmt: skip
LAST = [
    "Olsen", "Novak", "Silva", "Kaya", "Moreau", "Lind", "Petrov", "Costa", "Weber", "Sato", "Dunn", "Ferro", "Abel", "Bauer",
    "Cruz", "Duarte", "Egger", "Falk", "Gomez", "Hahn", "Iversen", "Jung", "Keller", "Lopez",
]  # fmt: skip
SIDE = ["North", "South", "East", "West", "Upper", "Lower", "New", "Old"]
TOWN = [
    "Kelmar", "Tolo", "Raven", "Sundra", "Orlin", "Vesk", "Maddow", "Pell", "Quarn", "Isola", "Brack", "Fenby", "Aldrin",
    "Borrow", "Cask", "Dorn", "Elm", "Fallow", "Garth", "Hythe", "Inver", "Jarrow", "Kirk", "Lund",
]  # fmt: skip
FAME = ["cheese", "glass", "bells", "boats", "honey", "paper", "roses", "salt", "silk", "steam", "tiles", "wool"]
KINDS = {
    "lives": "{} lives in {} today.",
    "born": "{} was born in {} in winter.",
    "famous": "{} is famous for {}.",
    "near": "{} lies near {} by road.",
}

SYSTEM = "Search, then answer."
HOME_QUESTION = "What is the home of {} famous for?"
TOWN_QUESTION = "What is {} famous for?"
PROTOCOL = ["<|begin_of_query|>", "<|end_of_query|>", "<|begin_of_documents|>", "<|end_of_documents|>"]
SEARCHES_TWICE = 0.3  # of the scripts that are asked for a home's fame
WARMUP_ROWS = {"home": 1200, "town": 600}
HELDOUT_SHARE = 0.25  # of all people, and of all towns


class World:
    """Who lives where, and what towns are famous for, among one split's people and towns."""

    def __init__(self, people: list[str], towns: list[str], rng: np.random.Generator) -> None:
        self.people, self.towns = people, towns
        self.home = {person: towns[i % len(towns)] for i, person in enumerate(rng.permutation(people).tolist())}
        self.birthplace = {person: str(rng.choice(towns)) for person in people}
        self.fame = {town: FAME[i % len(FAME)] for i, town in enumerate(rng.permutation(towns).tolist())}
        self.neighbour = {town: str(rng.choice([other for other in towns if other != town])) for town in towns}

    def facts(self) -> list[str]:
        pairs = {"lives": self.home, "born": self.birthplace, "famous": self.fame, "near": self.neighbour}
        return [KINDS[kind].format(*pair) for kind, known in pairs.items() for pair in known.items()]


def make_worlds(rng: np.random.Generator) -> tuple[World, World]:
    """People and towns for training, and others to hold out."""
    people = rng.permutation([f"{first} {last}" for first in FIRST for last in LAST]).tolist()
    towns = rng.permutation([f"{side} {town}" for side in SIDE for town in TOWN]).tolist()
    p, t = int(len(people) * HELDOUT_SHARE), int(len(towns) * HELDOUT_SHARE)
    return World(people[p:], towns[t:], rng), World(people[:p], towns[:t], rng)


def make_row(question: str, answer: str) -> dict:
    return {
        "data_source": "invented_facts",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "env_name": "rag_v2",
        "ability": "multi_hop_qa",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"question": question},
    }


def home_row(world: World, person: str) -> dict:
    return make_row(HOME_QUESTION.format(person), world.fame[world.home[person]])


def query(words: str) -> str:
    return f"<|begin_of_query|> {words}<|end_of_query|>"


def answer(text: str) -> str:
    return f"<answer> {text}</answer>"


def warmup_rows(world: World, rng: np.random.Generator) -> list[dict]:
    """Scripts over the training people and towns, in random order."""
    rows = []
    for town in rng.choice(world.towns, WARMUP_ROWS["town"]).tolist():
        fame = world.fame[town]
        rows.append({**make_row(TOWN_QUESTION.format(town), fame), "script": [query(f"{town} famous"), answer(fame)]})
    for person in rng.choice(world.people, WARMUP_ROWS["home"]).tolist():
        town, first = world.home[person], query(f"{person} lives")
        guessed = [first, answer(str(rng.choice(FAME)))]
        searched = [first, query(f"{town} famous"), answer(world.fame[town])]
        rows.append({**home_row(world, person), "script": searched if rng.random() < SEARCHES_TWICE else guessed})
    return [rows[i] for i in rng.permutation(len(rows))]


def vocabulary_texts() -> list[str]:
    """Everything that is said, for the tokenizer to learn as whole words; a document begins with a name without a space."""
    names = [name for names in (FIRST, LAST, SIDE, TOWN, FAME) for name in names]
    frames = [text.replace("{}", "") for text in (*KINDS.values(), HOME_QUESTION, TOWN_QUESTION)]
    said = [*frames, query("lives"), query("famous"), "(1)(2)(3)\nNone\n"]
    return ["system\n", "user\n", "assistant\n", SYSTEM, *said, *names, *(f" {name}" for name in names)]


def write_all(folder: Path, seed: int) -> None:
    """Write model, corpus and rows below a folder that exists and is empty."""
    rng = np.random.default_rng(seed)
    write_text_model(folder / "model", vocabulary_texts(), PROTOCOL, seed)
    train, heldout = make_worlds(rng)
    facts = rng.permutation(train.facts() + heldout.facts()).tolist()
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": fact}) + "\n" for fact in facts))
    write_rows(folder / "warmup.parquet", warmup_rows(train, rng))
    write_rows(folder / "train.parquet", [home_row(train, person) for person in train.people])
    write_rows(folder / "heldout.parquet", [home_row(heldout, person) for person in heldout.people])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: data/rag/seed<SEED>")
    args = parser.parse_args()
    out = args.out or Path(f"data/rag/seed{args.seed}")
    print(("wrote " if prepare(out, args.seed, [Path(__file__)], write_all) else "kept ") + str(out))


if __name__ == "__main__":
    main()
