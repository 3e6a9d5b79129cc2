"""Options of a `trimrt compress` that takes seconds, of a few digits."""

SHORT = [
    *("--threads", "1"),
    *("--teacher-architecture", "resnet18", "--teacher-epochs", "1", "--student-epochs", "2"),
    *("--pruning-epochs", "1", "--distillation-views", "2"),
    *("--teacher-batch-size", "16", "--student-batch-size", "16", "--pruning-batch-size", "16"),
]
