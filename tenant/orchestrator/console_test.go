package orchestrator

import (
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"testing"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// TestConsoleOutlivesTheVM: what a failed VM wrote can be read after its host has
// forgotten it, until its user deletes it.
func TestConsoleOutlivesTheVM(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	vm := w.create(api.CreateVM{Name: "a"})
	w.take(vm.ID)
	w.host.stop(vm.ID, event.LoaderFailed)
	w.waitPhase(vm.ID, reservation.Aborted)
	w.waitGone(vm.ID)
	read := func() (int, string) {
		resp := must[*http.Response](t)(w.operator.Get(w.api + "/v1/vms/a/console"))
		defer resp.Body.Close()
		return resp.StatusCode, string(must[[]byte](t)(io.ReadAll(resp.Body)))
	}
	if status, text := read(); status != http.StatusOK || text != "last words" {
		t.Errorf("console of an aborted VM: %d %q", status, text)
	}
	if status, p := w.call("DELETE", "/v1/vms/a", nil, nil); status != http.StatusOK {
		t.Fatalf("delete: %d %+v", status, p)
	}
	if _, err := os.Stat(w.o.consoleFile(vm.ID)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the console outlived its deletion: %v", err)
	}
}
