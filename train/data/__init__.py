"""Bytes to batches: corpora, their vocabularies, and the windows that a step trains on.

* fetch, pinned: files whose every byte is known, and where to get them
* user_files: the files that a path of the user's names
* python_files: rules for corpora of Python source
* recipes: how the files of each corpus become its splits
* builder, prepare: the tensorflow-datasets dataset of a corpus, and its flat files
* corpus: a prepared corpus and its tokens
* windows, suffix_match: which windows a step reads and from where; repetitions in a window
"""
