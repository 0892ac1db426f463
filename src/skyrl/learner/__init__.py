"""The policy that learns: :class:`skyrl.learner.step.LearnerStep` over a training library (a *backend*)."""
