// Command probe encloses itself in its first argument, a JSON object of fence.Files,
// then tries what the others name - "read FILE", "write FILE", "run FILE" - and prints
// the version in force and, for each, "yes" or "no".
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"foothold/internal/harden/fence"
)

func main() {
	var files fence.Files
	if err := json.Unmarshal([]byte(os.Args[1]), &files); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	version, err := files.Enclose()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(version)
	for _, wish := range os.Args[2:] {
		what, path, _ := strings.Cut(wish, " ")
		switch what {
		case "read":
			_, err = os.ReadFile(path)
		case "write":
			err = os.WriteFile(path, []byte("x"), 0o600)
		case "run":
			err = exec.Command(path).Run()
		}
		fmt.Println(map[bool]string{true: "yes", false: "no"}[err == nil])
	}
}
