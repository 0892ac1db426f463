"""Benchmarks of the field in the formats of their official files, as prompts: a table of declarations
(:mod:`skyrl.evaluation.tasks.table`), the files (:mod:`~skyrl.evaluation.tasks.files`), and what compares answers where
no built-in verifier does (:mod:`~skyrl.evaluation.tasks.graders`). docs/evaluation.md has the table in words."""
