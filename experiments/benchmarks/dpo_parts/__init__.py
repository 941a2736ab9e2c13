"""The DPO benchmark's parts: options, task, contenders, stages, report."""
