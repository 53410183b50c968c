package agent

import (
	"fmt"
	"os"

	"foothold/guest/opener"
	"foothold/guest/resident"
	"foothold/protocol/digest"

	"golang.org/x/sys/unix"
)

// serviceManager is the OS's first process.
const serviceManager = "/sbin/init"

// becomeOS is steps 5 and 6. On success the process is another program.
func (a *Agent) becomeOS(state *resident.State) error {
	clear(a.instance.key)
	if err := opener.WriteEtc(a.etc()); err != nil {
		return err
	}
	launch, err := resident.Prepare(state)
	if err != nil {
		return err
	}
	if err := opener.Switch(); err != nil {
		return err
	}
	if err := launch.Start(); err != nil {
		return err
	}
	a.Console.Say("starting the OS")
	unix.Umask(0o022)
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "NOTIFY_SOCKET=" + resident.NotifySocket}
	return fmt.Errorf("start %s: %w", serviceManager, unix.Exec(serviceManager, []string{serviceManager}, env))
}

// etc is the instance's part of /etc.
func (a *Agent) etc() map[string]string {
	id := digest.Of([]byte("foothold/machine-id/v1 " + a.instance.Reservation)).String()[:32]
	name := a.instance.Name
	return map[string]string{
		"machine-id":  id + "\n",
		"hostname":    name + "\n",
		"hosts":       "127.0.0.1 localhost\n127.0.1.1 " + name + "\n",
		"resolv.conf": "# no resolver: names are not resolved in this network\n",
	}
}

// Fail says why on the console and powers off.
func (a *Agent) Fail(err error, powerOff func() error) {
	a.Console.Say("FAILED %s: %v", reasonOf(err), err)
	if err := powerOff(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot power off:", err)
	}
}
