"""From a suite file to results: plan, trials, results.jsonl."""
