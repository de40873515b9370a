import pytest
import torch
import yaml

from modeling_baichuan_audio.training.recipe import SHIPPED_RECIPES, read_recipe
from modeling_baichuan_audio.training.run import training_arguments


STAGES = ["stage1", "stage2", "sft", "lora", "tokenizer", "mel_decoder", "flow_matching", "mel_and_flow", "vocoder"]


@pytest.fixture
def write(tmp_path):
    def write(**values):
        base = {"stage": "sft", "model": "m", "output": "o", "data": {"train": "t.jsonl"}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (base | values).items() if value is not None}))
        return path

    return write


@pytest.mark.parametrize("size", ["", "tiny/"])
@pytest.mark.parametrize("stage", STAGES)
def test_shipped_recipes_are_complete_and_say_how_to_run(size, stage):
    recipe = read_recipe(size + stage)
    assert recipe.stage == stage
    arguments = training_arguments(read_recipe(size + stage, ["training.bf16=false", "training.use_cpu=true"]))
    assert arguments.learning_rate > 0 and not arguments.remove_unused_columns
    text = (SHIPPED_RECIPES / f"{size}{stage}.yaml").read_text()
    assert f"#   baichuan-audio train {size}{stage} data.train=" in text


def test_changes_win(write):
    path = write(training={"learning_rate": "1e-4", "max_steps": 5})
    recipe = read_recipe(path, ["training.max_steps=7", "data.pack=true", "samples.every=3", "data.train=[a.jsonl, b.jsonl]"])
    assert recipe.training == {"learning_rate": 1e-4, "max_steps": 7}
    assert recipe.data.pack is True and recipe.samples.every == 3 and recipe.data.train == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ({"stage": "stage9"}, [], "`stage` must be one of"),
        ({"stage": "lora"}, [], "`lora` section"),
        ({"lora": {"rank": 4}}, [], "`lora` section"),
        ({"stage": "lora", "lora": {"target": "all"}}, [], "lora.target"),
        ({"stage": "lora", "lora": {"ranks": 4}}, [], "Unknown lora entries ranks"),
        ({"checkpoint": "x"}, [], "Unknown recipe entries checkpoint"),
        ({"model": None}, [], "lacks model"),
        ({"data": {"train": ""}}, [], "data.train"),
        ({"data": None}, [], "data.train"),
        ({"data": {"train": "x", "max_tokens": "many"}}, [], "must be a number"),
        ({"data": {"train": "x", "max_tokens": 0}}, [], "must be positive"),
        ({"data": {"train": "x", "pack": "yes please"}}, [], "true or false"),
        ({"data": {"train": "x", "on_error": "shrug"}}, [], "on_error"),
        ({"stage": "vocoder", "data": {"train": "x", "pack": True}}, [], "`data.pack` is for"),
        ({"dtype": "int8"}, [], "`dtype` must be"),
        ({"attn_implementation": 4}, [], "`attn_implementation` must be"),
        ({"data": [1]}, [], "must be a mapping"),
        ({}, ["nonsense"], "key=value"),
        ({}, ["stage.deep=1"], "no section"),
    ],
)
def test_bad_recipes_are_refused(write, values, changes, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(**values), changes)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="does not exist; the package has .*tiny/stage1"):
        read_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe(tmp_path / "broken.yaml")


@pytest.mark.parametrize("training", [{"learning_rat": 1}, {"save_strategy": "sometimes"}])
def test_training_arguments_are_checked(write, training):
    with pytest.raises(ValueError, match="`training` section"):
        training_arguments(read_recipe(write(training=training | {"use_cpu": True})))


@pytest.mark.parametrize("path", sorted((SHIPPED_RECIPES / "miniature").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_miniatures_recipes_are_complete(path):
    recipe = read_recipe(f"miniature/{path.stem}")
    arguments = training_arguments(recipe)
    assert arguments.max_steps > 0 and arguments.save_steps <= arguments.max_steps
    assert recipe.output == f"output/miniature-{path.stem}"
    train = recipe.data.train if isinstance(recipe.data.train, str) else f"[{','.join(recipe.data.train)}]"
    assert f"#   baichuan-audio train miniature/{path.stem} data.train={train}" in path.read_text()


def test_half_precision_needs_no_other_device(write):
    arguments = training_arguments(read_recipe(write(training={"bf16": True})))
    assert arguments.bf16 and arguments.use_cpu == (not torch.accelerator.is_available())
    assert training_arguments(read_recipe(write(training={"use_cpu": True}))).use_cpu


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze": "model."}, "must be a list"),
        ({"freeze": [3]}, "must be a list"),
        ({"freeze": ["model."], "stage": "lora", "lora": {}}, "not for lora"),
    ],
)
def test_what_cannot_be_frozen(write, values, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(**values))
