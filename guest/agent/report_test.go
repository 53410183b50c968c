package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"foothold/protocol/event"
)

// TestTheLoginAnswersTheReport: once the report is accepted, the firewall may cut its answer
// off. The VM that hears none takes the orchestrator's login for it; without a login it gives up.
func TestTheLoginAnswersTheReport(t *testing.T) {
	unheard := func(ctx context.Context) error {
		<-ctx.Done()
		return event.Refuse(event.BootServerFailed, "%v", ctx.Err())
	}
	refused := func(context.Context) error { return event.Refuse(event.ReportRefused, "no") }
	heard := func(context.Context) error { return nil }
	for name, c := range map[string]struct {
		report func(context.Context) error
		login  time.Duration // when it comes; 0: never
		want   event.Reason  // with which the wait for the login ends
	}{
		"answered, then the login":  {heard, time.Second, ""},
		"the login in its place":    {unheard, time.Second, ""},
		"refused":                   {refused, time.Second, event.ReportRefused},
		"neither answer nor login":  {unheard, 0, event.BootServerFailed},
		"the login after the limit": {unheard, 2 * time.Minute, event.BootServerFailed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent := send(t.Context(), time.Minute, c.report)
				ctx, end := sent.beside(t.Context())
				defer end()
				login := make(<-chan time.Time)
				if c.login > 0 {
					login = time.After(c.login)
				}
				select {
				case <-login:
					sent.answered()
					time.Sleep(time.Hour)
				case <-ctx.Done():
				}
				err := context.Cause(ctx)
				if c.want == "" && err != nil || c.want != "" && event.ReasonOf(err) != c.want {
					t.Errorf("the wait ends with %v, want %q", err, c.want)
				}
				if errors.Is(err, context.Canceled) {
					t.Error("without a reason")
				}
			})
		})
	}
}
