package resident

import "testing"

// TestStateOfAUnit: a unit that is on its way has not ended yet, and how it ends is known then.
func TestStateOfAUnit(t *testing.T) {
	for shown, want := range map[string]string{
		"ActiveState=active\nResult=success\nExecMainStatus=0\n":       running,
		"ActiveState=activating\nResult=exit-code\nExecMainStatus=1\n": running,
		"ActiveState=deactivating\nResult=success\nExecMainStatus=0\n": running,
		"ActiveState=inactive\nResult=success\nExecMainStatus=0\n":     exited,
		"ActiveState=failed\nResult=exit-code\nExecMainStatus=1\n":     failed,
		"ActiveState=inactive\nResult=start-limit\nExecMainStatus=1\n": failed,
		"": failed,
	} {
		if state, detail := stateOf(shown); state != want || want != running && detail == "" {
			t.Errorf("%q: %s (%s), want %s", shown, state, detail, want)
		}
	}
}
