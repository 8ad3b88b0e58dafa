"""``vlp completion``: print the script by which bash or zsh completes commands, options and tasks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

# Words for which the function has no answer are files, which the shell completes.
SCRIPT = """_vlp() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    case "$COMP_CWORD:${{COMP_WORDS[*]:1:$((COMP_CWORD-1))}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _vlp vlp
"""
ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "completion",
        help='completion of bash or zsh; add to ~/.bashrc: eval "$(vlp completion bash)"',
        epilog="example: vlp completion bash",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=partial(run, commands))


def run(commands, options: argparse.Namespace) -> int:
    """Print the script.

    Args:
        commands: The action of argparse that has the parsers of all commands.
        options: Parsed options.
    """
    from vlp.tasks.find import shipped_tasks

    tasks = f"""        3:eval\\ *) words="{" ".join(shipped_tasks())}" ;;"""
    script = SCRIPT.format(cases="\n".join([tasks, *cases(commands, ())]))
    print((ZSH if options.shell == "zsh" else "") + script, end="")
    return 0


def cases(commands, above: tuple[str, ...]) -> Iterator[str]:
    """Yield a case for the commands after the words ``above``, and for the options of each of them.

    Args:
        commands: The action of argparse that has the parsers of the commands.
        above: Words before them on the command line, without ``vlp``.
    """
    yield f"""        {len(above) + 1}:{_escaped(above)}) words="{" ".join(commands.choices)}" ;;"""
    for name, parser in commands.choices.items():
        words = (*above, name)
        options = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from cases(action, words)
            options += [option for option in action.option_strings if option.startswith("--")]
        path = _escaped(words)
        yield f"""        *:{path}|*:{path}\\ *) [[ $word == -* ]] && words="{" ".join(options)}" ;;"""


def _escaped(words: tuple[str, ...]) -> str:
    return "\\ ".join(words)
