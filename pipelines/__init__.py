"""Jobs on Ray: training sets, meta-training, evaluation, bulk conversion, benchmarks; and the `d2l` command."""
