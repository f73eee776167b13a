def test_one(pilot):
    done = pilot.glexec()
    print(done)
    assert "gl0" in done.out
