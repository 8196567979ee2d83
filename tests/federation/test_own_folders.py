"""A node of a deployment has users in a folder of its own, and says itself who they are."""

from dataclasses import replace

import pytest
from deployed import PLACES, context_of, deployed_config, hosting_answer, train_answer
from own_data import CLASSES, USERS, write_hf, write_images, write_table_of_images, write_texts
from writers import write_writers

from fedpriv.config_files import parse_config
from fedpriv.federation.gate import hosting_in
from fedpriv.federation.policy import NodePolicy, NodeTerms, NotAllowed

IMAGES = {
    "name": "image_folder",
    "partition": {"kind": "natural"},
    "classes": list(CLASSES),
    "image": {"size": 8, "color": "grey"},
}
TABLE = {**IMAGES, "name": "table", "target": "kind", "files": "file"}


def write_rows(folder, users=None):
    """A table of images with a column `user`, which is the default."""
    write_table_of_images(folder, users)
    table = folder / "people.tsv"
    table.write_text(table.read_text().replace("who", "user", 1))


HF = {**IMAGES, "name": "hf", "shape": [1, 8, 8]}
TEXT = {"name": "text", "partition": IMAGES["partition"], "block": 16}
FLWR = {"name": "flwr_datasets", "classes": list(CLASSES), "shape": [1, 8, 8]}
GPT = {"name": "gpt", "dim": 8, "depth": 1, "heads": 2}
CASES = {
    "image_folder": (IMAGES, write_images),
    "table": (TABLE, write_rows),
    "hf": (HF, lambda folder, users=None: write_hf(folder, "images", users)),
    "text": (TEXT, write_texts),
}


def config_for(folder, **data):
    config = deployed_config(write_writers(folder / "plain", {1: 3}))
    document = {**config.model_dump(mode="json")}
    document["data"] = {**data, "users": PLACES, "path": str(folder / "servers")}
    if data["name"] == "text":
        document["model"] = GPT
    return parse_config(document)


@pytest.mark.parametrize("name", CASES)
def test_a_node_trains_the_users_of_its_own_folder(name, tmp_path):
    data, write = CASES[name]
    write(tmp_path / "servers")
    write(tmp_path / "node", dict.fromkeys(USERS[:6], 4))
    config = config_for(tmp_path, **data)
    hosting = hosting_in(hosting_answer(config, tmp_path / "node"), {1000})
    assert 1 <= hosting.users <= 7
    answer = train_answer(config, tmp_path / "node", range(hosting.users))
    assert not answer.has_error()
    assert answer.content.array_records


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({**IMAGES, "pattern": "(?P<user>.*)"}, "pattern"),
        ({**IMAGES, "held_out": USERS[0]}, "held_out"),
        ({**IMAGES, "classes": None}, "classes"),
        ({**TABLE, "user": "session"}, "user"),
        ({**HF, "shape": None}, "shape"),
        (FLWR, "partitioner"),
        ({**TEXT, "tokenizer": {"kind": "bpe", "public": USERS[0]}}, "tokenizer"),
    ],
)
def test_a_server_does_not_say_who_a_nodes_users_are(changed, key, tmp_path):
    write_images(tmp_path / "servers")
    config = config_for(tmp_path, **changed)
    terms = NodeTerms.of(context_of(tmp_path / "servers"))
    with pytest.raises(NotAllowed, match=f"data.{key} decides who a user is"):
        terms.check(config, "")
    policy = {"smallest_z": 0.1, "largest_bound": 10.0, "rounds": 9}
    allowed = NodePolicy(**policy, users={key: config.model_dump(mode="json")["data"][key]})
    own = replace(terms, policy=allowed)
    own.check(config, "")
    other = replace(terms, policy=NodePolicy(**policy, users={key: "other"}))
    with pytest.raises(NotAllowed, match=f"data.{key} decides"):
        other.check(config, "")
