"""A config is a Python module: which of its functions is called, what it can import, and what is refused."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment
from vlp.errors import UserError
from vlp.specs.config_file import call_config, load_module


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "vlp_test_config.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


TWO = """
from __future__ import annotations
class Experiment: ...
class Other: ...
def config() -> Experiment: return 1
def small() -> Experiment: return 2
def sized(size) -> Experiment: return size
def helper() -> Other: return 3
def plain(): return 4
"""


class Experiment:
    pass


@pytest.mark.parametrize(("name", "result"), [("", 1), (":config", 1), (":small", 2), (":helper", 3), (":plain", 4)])
def test_function_is_chosen_by_name(write, name, result):
    assert call_config(write(TWO) + name, [int]) == result


def test_unknown_function_lists_those_annotated_to_return_an_experiment(write):
    path = write(TWO)
    with pytest.raises(UserError, match=r"does not define tiny\(\); it has config, small, sized$"):
        call_config(f"{path}:tiny", [Experiment])
    with pytest.raises(UserError, match=r"does not define config\(\); it must return a .*\.Experiment"):
        call_config(write("x = 1"), [Experiment])
    with pytest.raises(UserError, match=r"sized\(\) of .* needs size; name a function that takes no arguments"):
        call_config(f"{write(TWO)}:sized", [int])
    with pytest.raises(UserError, match="returns a int, not a .*Experiment"):
        call_config(write(TWO), [Experiment])
    with pytest.raises(UserError, match="no config file nowhere.py"):
        call_config("nowhere.py:config", [int])


def test_annotations_are_read_with_and_without_postponed_evaluation(write):
    path = write(TWO.replace("from __future__ import annotations", ""))
    with pytest.raises(UserError, match="it has config, small, sized$"):
        call_config(f"{path}:tiny", [Experiment])


def test_config_imports_the_modules_next_to_it(write):
    write("VALUE = 7", "vlp_test_helper.py")
    assert call_config(write("def config():\n    import vlp_test_helper\n    return vlp_test_helper.VALUE"), [int]) == 7


def test_class_of_a_config_can_be_pickled(write):
    made = call_config(write("class Mine:\n    x = 1\ndef config(): return Mine()"), [object])
    assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_edited_config_is_read_again(write):
    assert call_config(write("def config(): return 1"), [int]) == 1
    assert call_config(write("def config(): return 2"), [int]) == 2


def test_config_that_another_config_has_imported_is_the_same_module(write):
    write("class Mine: ...\ndef config(): return Mine()", "vlp_test_base.py")
    path = write("import vlp_test_base\ndef config(): return vlp_test_base.Mine()")
    made = call_config(path, [object])
    assert type(call_config(path.replace("vlp_test_config", "vlp_test_base"), [object])) is type(made)


def test_name_of_an_imported_module_is_refused(write):
    with pytest.raises(UserError, match="Python has imported another module of the name json; rename the file"):
        call_config(write("def config(): return 1", "json.py"), [int])
    import json

    assert sys.modules["json"] is json and json.dumps(1) == "1"


def test_failed_import_leaves_no_module_behind(write):
    for text, error in (("import vlp_nothing_such", UserError), ("x = ", UserError), ("1 / 0", ZeroDivisionError)):
        with pytest.raises(error):
            load_module(Path(write(text)))
        assert "vlp_test_config" not in sys.modules


def test_missing_argument_of_a_spec_is_one_line(write):
    text = "from vlp.config import Data\ndef config(): return Data(batch_size=3)"
    with pytest.raises(UserError, match="Data: missing 1 required positional argument: 'train'"):
        call_config(write(text), [object])


def test_other_errors_name_the_line_and_keep_their_cause(write):
    with pytest.raises(UserError, match=r"TypeError: unsupported operand .*:1 in config: ") as caught:
        call_config(write("def config(): return 1 + 'a'"), [object])
    assert isinstance(caught.value.__cause__, TypeError)


def test_spawned_data_worker_imports_the_class_of_a_config(write, tmp_path_factory):
    """A start method other than fork: the worker finds the config by the search path that it gets from its parent."""
    config = write("class Mine:\n    x = 1\n\ndef config(): return Mine()")
    main = tmp_path_factory.mktemp("elsewhere") / "main.py"
    main.write_text(
        "import multiprocessing, sys\n"
        "from vlp.specs.config_file import call_config\n"
        "if __name__ == '__main__':\n"
        "    made = call_config(sys.argv[1], (object,))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply_async(repr, (made,)).get(20))\n"
    )
    command = [sys.executable, str(main), config]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.stdout.startswith("<vlp_test_config.Mine object"), done.stderr
