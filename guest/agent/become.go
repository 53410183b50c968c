package agent

import (
	"errors"
	"fmt"
	"os"
	"time"

	"foothold/guest/hostport"
	"foothold/guest/opener"
	"foothold/guest/resident"
	"foothold/protocol/digest"
	"foothold/protocol/event"

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

// portModule drives the port to the host. It is loaded for the last word alone.
const portModule = "virtio_console"

// Fail says why on the console, tells the host the reason, and powers off. Whoever waits
// for this VM hears it from the host; there is nobody else to tell once it is unlocked.
func (a *Agent) Fail(err error, powerOff func() error) {
	reason := reasonOf(err)
	a.Console.Say("FAILED %s: %v", reason, err)
	if err := within(lastWord, func() error { return a.giveUp(reason) }); err != nil {
		a.Console.Say("the host was not told: %v", err)
	}
	if err := powerOff(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot power off:", err)
	}
}

// lastWord bounds all that telling the host takes. The driver waits for the host's device,
// with no limit of its own, and no host is to keep a VM that gives up from its end.
const lastWord = 20 * time.Second

// within returns what do returns, or after limit that it has not.
func within(limit time.Duration, do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return fmt.Errorf("it took longer than %s", limit)
	}
}

func (a *Agent) giveUp(reason event.Reason) error {
	if a.kernel == nil {
		return errors.New("no module was loaded")
	}
	if err := a.kernel.Load(portModule); err != nil {
		return err
	}
	port, err := hostport.Open()
	if err != nil {
		return err
	}
	defer port.Close()
	return hostport.GiveUp(port, reason)
}
