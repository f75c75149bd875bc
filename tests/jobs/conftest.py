from job_fixtures import *  # noqa: F403
