"""What the four notebooks teach with. Read it in the notebooks' order:

01-Setup      `session` starts a notebook, `config` says which model and reviews, `gpu` what computes here,
              `data` turns reviews into blocks, `sizes` counts numbers and bytes, `judges` and `evaluation` score text
02-Train      `adapters` puts (IA)³ and its rivals on a model, `training` trains, `saving` writes and reads adapters
03-Inference  `generation` writes text, `evaluation` has the strength dial
04-Compare    `runs` keeps a run as one JSON, `metrics` has intervals and tables

`plots` draws, `pages` shows tables. Nothing is imported here: a script that needs only `config` starts at once.
"""
