package ledger

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }
