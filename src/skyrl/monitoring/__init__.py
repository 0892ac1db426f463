"""Everything a person reads about a run: metrics, sinks, the summary and the report.

Only the sink of gauges imports ray, and nothing torch, vllm or deepspeed: a report can be made again anywhere.
"""
