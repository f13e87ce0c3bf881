"""What a rebalance shows of itself: events, traces, metrics."""
