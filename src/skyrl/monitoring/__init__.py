"""Everything a person reads about a run: metrics, sinks, the summary and the report.

Nothing here imports ray, torch, vllm or deepspeed, so a report can be made again anywhere.
"""
