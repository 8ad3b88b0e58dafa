"""Recorded results: NAME.json is the record of one run, of several seeds, or of the variants of an ablation.

`results.record` makes a record from run folders, `results.page` renders all of them to docs/results.md. by_hand.md has the
results from before there were records.

    python -m results record NAME RUN [RUN ...]    make the record NAME, and render the page again
    python -m results                              render the page again (make results)

The docstring of a config quotes a record by ``(results: NAME)`` after the numbers, a Markdown page by a link such as
``[32.4 %](results.md#NAME)``. A test compares each number of the quote with the record.
"""
