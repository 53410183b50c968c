package measure

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

func read(t *testing.T, dev transport.TPM, index uint) digest.SHA256 {
	t.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(index),
	}}}}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	return digest.SHA256(rsp.PCRValues.Digests[0].Buffer)
}

func TestLaunchReplaysToTheRegister(t *testing.T) {
	v := swtpmtest.New(t)
	dir := t.TempDir()
	var files []File
	for _, name := range []string{"agent", "qemu"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("content of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, File{name, f})
	}
	dev := v.Open()
	events, err := Launch(dev, files)
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	log := filepath.Join(dir, "log.json")
	if err := WriteLog(log, events); err != nil {
		t.Fatal(err)
	}
	back, err := ReadLog(log)
	if err != nil || !reflect.DeepEqual(back, events) {
		t.Fatalf("read back %v, %v", back, err)
	}
	if events[0].Digest != digest.Of([]byte("content of agent")) || events[1].Name != "qemu" {
		t.Errorf("events %v", events)
	}
	// The register outlives the connection: the agent opens the TPM after the launcher.
	dev = v.Open()
	if got, want := read(t, dev, pcr.Platform), pcr.Replay(events)[pcr.Platform]; got != want || got.IsZero() {
		t.Errorf("register holds %s, log replays to %s", got, want)
	}
	dev.Close()
	v.Restart()
	if got := read(t, v.Open(), pcr.Platform); !got.IsZero() {
		t.Error("a boot of the host does not clear the register")
	}
}
